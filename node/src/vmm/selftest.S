# The guest of selftest.rs, which holds it assembled: any change here is to be assembled into it.
# 64 KiB image, mapped so that it ends at 4 GiB; code runs from 0xffff0000 + offset.
.code16
start:
  cli
  lgdtl %cs:gdtr - start
  movl %cr0, %eax
  orl $1, %eax
  movl %eax, %cr0
  ljmpl $8, $(0xffff0000 + prot - start)
.code32
prot:
  movw $16, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movl $0x8000, %esp
  # page tables at 0x1000: PML4[0]->0x2000, PDPT[0]->0x3000 ; PDPT[3]->0x4000
  xorl %eax, %eax
  movl $0x1000, %edi
  movl $0x1000, %ecx
  rep stosl
  movl $0x2003, 0x1000
  movl $0x3003, 0x2000
  movl $0x4003, 0x2018
  movl $0x83, 0x3000
  movl $0xffe00083, 0x4ff8
  movl $0x1000, %eax
  movl %eax, %cr3
  movl %cr4, %eax
  orl $0x620, %eax
  movl %eax, %cr4
  movl $0xc0000080, %ecx
  rdmsr
  orl $0x101, %eax
  wrmsr
  movl %cr0, %eax
  orl $0x80000000, %eax
  andl $0xfffffffb, %eax
  orl $2, %eax
  movl %eax, %cr0
  ljmpl $24, $(0xffff0000 + long - start)
.code64
long:
  movw $16, %ax
  movw %ax, %ss
  movl $0x8000, %esp
  # breakpoint through an IDT: gate 3 at 0x5030
  leaq handler(%rip), %rax
  movl $0x5030, %edi
  movw %ax, (%rdi)
  movw $24, 2(%rdi)
  movw $0x8e00, 4(%rdi)
  shrq $16, %rax
  movw %ax, 6(%rdi)
  shrq $16, %rax
  movl %eax, 8(%rdi)
  movw $0xfff, 0x6000
  movq $0x5000, 0x6002
  lidt 0x6000
  xorl %ebx, %ebx
  int3
  cmpl $0x55, %ebx
  jne fail
  # what compilers emit for x86-64-v2, and what a kernel does with GS
  movl $0x12345678, %eax
  popcntq %rax, %rcx
  cmpl $13, %ecx
  jne fail
  movq %rax, %xmm0
  pshufb %xmm0, %xmm0
  pinsrq $1, %rax, %xmm1
  pextrq $1, %xmm1, %rdx
  cmpq %rdx, %rax
  jne fail
  crc32q %rax, %rcx
  movl $0xc0000101, %ecx
  movl $0x7000, %eax
  xorl %edx, %edx
  wrmsr
  swapgs
  swapgs
  movl $0x77, %gs:0
  cmpl $0x77, 0x7000
  jne fail
  lock incl 0x7000
  movl $0x10, %eax
  invlpg (%rax)
  rdtsc
  cpuid
  movb $0x10, %al
  jmp out
fail:
  movb $0x11, %al
out:
  outb %al, $0xf4
1: hlt
  jmp 1b
handler:
  movl $0x55, %ebx
  iretq
.p2align 3
gdt:
  .quad 0
  .quad 0x00cf9b000000ffff
  .quad 0x00cf93000000ffff
  .quad 0x00af9b000000ffff
gdtr:
  .word 31
  .long 0xffff0000 + gdt - start
end:
