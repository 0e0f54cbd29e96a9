# Entry of the bare guest. The note makes the file a PVH kernel: QEMU's -kernel enters at _start in 32-bit protected mode
# with flat segments, paging and interrupts off, and the address of the start information in ebx.

	.section .note.PVH, "a", @note
	.align	4
	.long	4, 4, 18		# sizes of name and value; XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	_start

	.section .text.start, "ax"
	.global	_start
_start:
	cld
	movl	$stack_top, %esp
	pushl	%ebx
	call	guest_main
1:	hlt
	jmp	1b

	.bss
	.align	16
	.skip	16384
stack_top:

	.section .note.GNU-stack, "", @progbits
