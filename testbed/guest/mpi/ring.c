/*
 * The MPI job of the lab: a ring and an allreduce, again and again, each checked against what must come out.
 *
 * Every rank sends a block of words around the ring; each rank that passes it on checks and changes it, so the block that
 * comes home tells of every hop. Then all sum up what they hold. Rank 0 writes "ITERATIONS MESSAGES ERRORS" to the file
 * named by its first argument, and ends the job once the file named by the second one exists and enough messages (third
 * argument) went around. The last line is its verdict, on standard output.
 */
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { WORDS = 256 };

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27; x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* What word `w` of the block that began at `home` holds after `hops` hops in iteration `i`. */
static uint64_t expected(uint64_t i, int home, int hops, int w)
{
	uint64_t x = mix(i * 1000003u + (uint64_t)home * 4099u + (uint64_t)w);
	for (int h = 0; h < hops; h++)
		x = mix(x + (uint64_t)h + 1);
	return x;
}

int main(int argc, char **argv)
{
	int rank, ranks;
	uint64_t block[WORDS], errors = 0, messages = 0, iterations = 0;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	if (argc < 4)
		MPI_Abort(MPI_COMM_WORLD, 2);
	uint64_t least = strtoull(argv[3], NULL, 10);

	for (int go = 1; go; iterations++) {
		for (int w = 0; w < WORDS; w++)
			block[w] = expected(iterations, rank, 0, w);
		/* Each block goes all the way round: `ranks` hops. */
		for (int hop = 1; hop <= ranks; hop++) {
			MPI_Sendrecv_replace(block, WORDS, MPI_UINT64_T, (rank + 1) % ranks, 7,
				(rank + ranks - 1) % ranks, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
			messages += (uint64_t)ranks;
			int home = ((rank - hop) % ranks + ranks) % ranks;
			for (int w = 0; w < WORDS; w++) {
				if (block[w] != expected(iterations, home, hop - 1, w))
					errors++;
				block[w] = mix(block[w] + (uint64_t)hop);
			}
		}
		/* Sums: of what each rank contributes, and of the errors seen anywhere. */
		uint64_t mine[3] = { mix(iterations + (uint64_t)rank), errors, 0 }, all[3];
		if (rank == 0 && messages >= least && access(argv[2], F_OK) == 0)
			mine[2] = 1;
		MPI_Allreduce(mine, all, 3, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
		uint64_t sum = 0;
		for (int r = 0; r < ranks; r++)
			sum += mix(iterations + (uint64_t)r);
		if (all[0] != sum)
			errors++;
		go = all[2] == 0;
		if (rank == 0 && iterations % 8 == 0) {
			FILE *told = fopen(argv[1], "r+");
			if (!told)
				told = fopen(argv[1], "w");
			if (told) {
				fprintf(told, "%llu %llu %llu \n", (unsigned long long)iterations,
					(unsigned long long)messages, (unsigned long long)all[1]);
				fclose(told);
			}
		}
	}
	uint64_t total = 0;
	MPI_Reduce(&errors, &total, 1, MPI_UINT64_T, MPI_SUM, 0, MPI_COMM_WORLD);
	if (rank == 0)
		printf("verdict: ranks %d iterations %llu messages %llu errors %llu\n", ranks,
			(unsigned long long)iterations, (unsigned long long)messages, (unsigned long long)total);
	MPI_Finalize();
	return total ? 1 : 0;
}
