/*
 * The bare guest: dirties memory at a set rate and verifies it, without an operating system.
 *
 * It runs where KVM cannot start Linux, so it uses few instructions: no paging, no interrupts, no floating point. It speaks the
 * language of testbed/src/guest/wire.rs on COM2 and writes its progress to COM1 once a second. Its pages follow the formula of
 * testbed/src/guest/pattern.rs. Its clock is the ACPI timer; it has no wall clock and reports that gap as 0.
 *
 * Memory: this program at 1 MiB, one 32-bit version for every page from 8 MiB, the pages themselves from 16 MiB. A churn over
 * more memory than before adds pages, one over less only rewrites the first ones; verify checks every page ever written.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
	COM1 = 0x3f8,
	COM2 = 0x2f8,
	PAGE_WORDS = 512,
	GROUP = 4,
	STALE_SEARCH = 64,
	LINE = 1024,
	TICKS_PER_MS = 3580,	/* 3.579545 MHz, 0.01 % off */
	TICK_MASK = 0xffffff,
};

#define PAGES_AT 0x1000000u
#define TICKS_PER_SECOND 3579545ull

static u32 *const versions = (u32 *)0x800000;
static u64 *const pages = (u64 *)PAGES_AT;

static u64 seed, draw, written, uptime_ms, ticks10;
static u32 page_count, page_limit, hot_count, rate_kbps, max_gap_ms;
static u16 timer_port;

/* Ports */

static void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }

static u8 inb(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static u32 inl(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void put(u16 port, char letter)
{
	while (!(inb(port + 5) & 0x20))
		;
	outb(port, letter);
}

static void put_text(u16 port, const char *text)
{
	while (*text)
		put(port, *text++);
}

static void put_number(u16 port, u64 number)
{
	char digits[21];
	int at = sizeof(digits);

	digits[--at] = 0;
	do {
		/* 64-bit division by 10 in two steps of the 32-bit instruction: there is no runtime library. */
		u32 high = number >> 32, low = number, rest = high % 10, quotient;

		__asm__("divl %4" : "=a"(quotient), "=d"(rest) : "a"(low), "d"(rest), "r"(10));
		number = ((u64)(high / 10) << 32) | quotient;
		digits[--at] = '0' + rest;
	} while (number);
	put_text(port, digits + at);
}

static void put_field(const char *name, u64 number)
{
	put_text(COM2, name);
	put_number(COM2, number);
}

/* The page formula */

static u64 mix(u64 x)
{
	u64 z = x + 0x9E3779B97F4A7C15ull;

	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
	z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
	return z ^ (z >> 31);
}

/* The random word of a page's first group, and from one group's that of the next. */
static u64 first_random(u32 index, u32 version)
{
	return mix(seed ^ mix(((u64)index << 32) | version));
}

static u64 next_random(u64 random)
{
	return random * 0x5851F42D4C957F2Dull + 0x14057B7EF767814Full;
}

/* What the other words of a group have in common. */
static u64 repeated(u64 random, u32 group)
{
	u32 four = (u32)(random >> 56) * 0x01010101u;

	return (((u64)four << 32) | four) + group * GROUP;
}

static int group_is(const u64 *page, u32 group, u64 random)
{
	const u64 *words = page + group * GROUP;
	u64 rest = repeated(random, group);

	return words[0] == random && words[1] == rest + 1 && words[2] == rest + 2 && words[3] == rest + 3;
}

static int page_is(u32 index, u32 version)
{
	const u64 *page = pages + index * PAGE_WORDS;
	u64 random = first_random(index, version);
	u32 group;

	for (group = 0; group < PAGE_WORDS / GROUP; group++, random = next_random(random))
		if (!group_is(page, group, random))
			return 0;
	return 1;
}

static void write_page(u32 index)
{
	u64 *words = pages + index * PAGE_WORDS;
	u32 version = versions[index] + 1, group;
	u64 random = first_random(index, version);

	for (group = 0; group < PAGE_WORDS / GROUP; group++, words += GROUP) {
		u64 rest = repeated(random, group);

		words[0] = random;
		words[1] = rest + 1;
		words[2] = rest + 2;
		words[3] = rest + 3;
		random = next_random(random);
	}
	versions[index] = version;
	written++;
}

/* Says what a corrupt page is instead; *found is the older version of a stale or torn one, else 0. */
static const char *diagnose(u32 index, u32 *found)
{
	const u64 *page = pages + index * PAGE_WORDS;
	u32 version = versions[index], word, group, back;

	*found = 0;
	for (word = 0; word < PAGE_WORDS && !page[word]; word++)
		;
	if (word == PAGE_WORDS)
		return "zero";
	for (back = 1; back <= STALE_SEARCH && back < version; back++) {
		u64 expected = first_random(index, version), older = first_random(index, version - back);
		int has_expected = 0;

		for (group = 0; group < PAGE_WORDS / GROUP; group++) {
			if (group_is(page, group, expected))
				has_expected = 1;
			else if (!group_is(page, group, older))
				break;
			expected = next_random(expected);
			older = next_random(older);
		}
		if (group == PAGE_WORDS / GROUP) {
			*found = version - back;
			return has_expected ? "torn" : "stale";
		}
	}
	return "garbage";
}

/* Requests */

static void reply(u32 id, int ok)
{
	put_field("{\"id\":", id);
	put_text(COM2, ok ? ",\"ok\":true" : ",\"ok\":false");
}

static void answer_verify(void)
{
	u32 index, first = 0, found = 0, corrupt = 0;
	const char *fault = 0;
	u64 versions_total = 0;

	for (index = 0; index < page_count; index++) {
		versions_total += versions[index];
		if (page_is(index, versions[index]))
			continue;
		if (!corrupt++) {
			first = index;
			fault = diagnose(index, &found);
		}
	}
	put_field(",\"verified\":{\"pages_verified\":", page_count);
	put_field(",\"pages_corrupt\":", corrupt);
	put_field(",\"versions_total\":", versions_total);
	put_field(",\"pages_written\":", written);
	if (corrupt) {
		put_field(",\"first_corrupt\":{\"index\":", first);
		put_field(",\"expected_version\":", versions[first]);
		put_text(COM2, ",\"fault\":\"");
		put_text(COM2, fault);
		put(COM2, '"');
		if (found)
			put_field(",\"found_version\":", found);
		put(COM2, '}');
	}
	put(COM2, '}');
}

static void answer_stats(int reset)
{
	put_field(",\"stats\":{\"uptime_ms\":", uptime_ms);
	put_field(",\"seed\":", seed);
	put_field(",\"pages\":", page_count);
	put_field(",\"pages_written\":", written);
	put_text(COM2, rate_kbps ? ",\"churning\":true" : ",\"churning\":false");
	put_field(",\"ticks\":", ticks10);
	put_field(",\"max_gap_monotonic_ms\":", max_gap_ms);
	put_text(COM2, ",\"max_gap_wall_ms\":0}");
	if (reset)
		max_gap_ms = 0;
}

/* What follows `key` in `line`, or 0. */
static const char *after(const char *line, const char *key)
{
	for (; *line; line++) {
		const char *a = line, *b = key;

		while (*b && *a == *b)
			a++, b++;
		if (!*b)
			return a;
	}
	return 0;
}

static u64 number_after(const char *line, const char *key)
{
	const char *at = after(line, key);
	u64 number = 0;

	while (at && *at >= '0' && *at <= '9')
		number = number * 10 + (*at++ - '0');
	return number;
}

static int churn(u32 mb, u32 kbps, int hot_quarter)
{
	u32 count = mb * 256;

	if (!mb || mb > page_limit / 256)
		return 0;
	for (; page_count < count; page_count++) {
		versions[page_count] = 0;
		write_page(page_count);
	}
	hot_count = hot_quarter ? count / 4 : count;
	rate_kbps = kbps;
	return 1;
}

static void obey(const char *line)
{
	u32 id = number_after(line, "\"id\":");

	if (after(line, "\"cmd\":\"ping\"")) {
		reply(id, 1);
	} else if (after(line, "\"cmd\":\"churn\"")) {
		int ok = churn(number_after(line, "\"mb\":"), number_after(line, "\"rate_kbps\":"),
			       after(line, "\"hot_quarter\":true") != 0);

		reply(id, ok);
		if (!ok) {
			put_field(",\"error\":\"mb must be 1 to ", page_limit / 256);
			put(COM2, '"');
		}
	} else if (after(line, "\"cmd\":\"stop\"")) {
		rate_kbps = 0;
		reply(id, 1);
	} else if (after(line, "\"cmd\":\"verify\"")) {
		reply(id, 1);
		answer_verify();
	} else if (after(line, "\"cmd\":\"stats\"")) {
		reply(id, 1);
		answer_stats(after(line, "\"reset\":true") != 0);
	} else {
		reply(id, 0);
		put_text(COM2, ",\"error\":\"not a request\"");
	}
	put_text(COM2, "}\n");
}

/* Takes what has come on COM2; returns whether a request was done. */
static int listen(void)
{
	static char line[LINE];
	static u32 length;

	while (inb(COM2 + 5) & 1) {
		char letter = inb(COM2);

		if (letter != '\n') {
			/* A longer line is no request; what is kept of it will not parse as one. */
			if (length < LINE - 1)
				line[length++] = letter;
			continue;
		}
		line[length] = 0;
		length = 0;
		if (line[0]) {
			obey(line);
			return 1;
		}
	}
	return 0;
}

/* Start */

struct start_info {
	u32 magic, version, flags, modules;
	u64 module_list, cmdline, rsdp, memmap;
	u32 memmap_entries, reserved;
};

struct memmap_entry {
	u64 start, size;
	u32 type, reserved;
};

static void start(const struct start_info *info)
{
	const struct memmap_entry *entry = (const struct memmap_entry *)(u32)info->memmap;
	const char *cmdline = (const char *)(u32)info->cmdline;
	u32 i, low, high;

	for (i = 0; info->version >= 1 && i < info->memmap_entries; i++, entry++) {
		u64 end = entry->start + entry->size;

		if (entry->type == 1 && entry->start <= PAGES_AT && end > PAGES_AT)
			page_limit = (u32)((end - PAGES_AT) >> 12);
	}
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	seed = cmdline ? number_after(cmdline, "godwit.seed=") : 0;
	if (!seed)
		seed = mix(((u64)high << 32) | low);
	draw = seed;
	/* The firmware has placed the ACPI ports; the LPC bridge (00:1f.0) says where. The timer is the ninth byte. */
	outl(0xcf8, 0x8000f840);
	timer_port = (inl(0xcfc) & 0xff80) + 8;
}

static void announce(void)
{
	put_text(COM1, "bare: pages ");
	put_number(COM1, page_count);
	put_text(COM1, " written ");
	put_number(COM1, written);
	put(COM1, '\n');
}

void guest_main(const struct start_info *info)
{
	u64 owed = 0, second = 0;
	u32 last, part = 0, part10 = 0;

	start(info);
	put_text(COM1, "godwit-guest ready\n");
	last = inl(timer_port);
	for (;;) {
		u32 now = inl(timer_port), passed = (now - last) & TICK_MASK, gap = passed / TICKS_PER_MS;

		last = now;
		if (gap > max_gap_ms)
			max_gap_ms = gap;
		part += passed;
		part10 += passed;
		for (; part >= TICKS_PER_MS; part -= TICKS_PER_MS)
			uptime_ms++;
		for (; part10 >= 10 * TICKS_PER_MS; part10 -= 10 * TICKS_PER_MS)
			ticks10++;
		if (uptime_ms - second >= 1000) {
			second = uptime_ms;
			announce();
		}
		/* Time lost to a pause is not made up. */
		if (passed > 100 * TICKS_PER_MS)
			passed = 100 * TICKS_PER_MS;
		owed += (u64)passed * rate_kbps * 1000;
		while (owed >= 4096 * TICKS_PER_SECOND) {
			owed -= 4096 * TICKS_PER_SECOND;
			draw = mix(draw);
			write_page(((draw >> 32) * hot_count) >> 32);
			/* A rate beyond what this machine can do must not keep requests waiting. */
			if (((inl(timer_port) - last) & TICK_MASK) > 100 * TICKS_PER_MS)
				owed = 0;
		}
		if (!rate_kbps)
			owed = 0;
		if (listen())
			last = inl(timer_port);
	}
}
