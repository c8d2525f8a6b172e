/* The data of a lab guest on its disks, and their audit. Shared by the parts of the guest's program. */
#ifndef LAB_H
#define LAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ROW_BYTES = 512, BLOCK_BYTES = 4096, MAX_AREAS = 8, MAX_BLOCKS = 1 << 16 };

/* One row is one sector: a disk writes it completely or not at all, so a half-written row is always damage. */
struct row {
    char magic[8];
    uint64_t number;   /* 1, 2, 3, ... ; row n lies at offset (n - 1) * ROW_BYTES */
    uint64_t time_us;  /* guest's wall clock */
    uint32_t boot;     /* which boot of the guest wrote it */
    uint32_t area;     /* the block that was on stable storage before this row was begun: area, block; */
    uint64_t block;    /* its version is this row's number */
    uint32_t previous; /* crc of the row before: two histories mixed show as a fork */
    uint8_t filler[ROW_BYTES - 48];
    uint32_t crc;
} __attribute__((packed));

/* Block 0 of an area is its header (version = number of blocks that follow); a block of zeroes was never written. */
struct block {
    char magic[8];
    uint32_t area;
    uint32_t pad;
    uint64_t block;
    uint64_t version;
    uint64_t time_us;
    uint8_t filler[BLOCK_BYTES - 44];
    uint32_t crc;
} __attribute__((packed));

_Static_assert(sizeof(struct row) == ROW_BYTES, "row");
_Static_assert(sizeof(struct block) == BLOCK_BYTES, "block");

#define ROW_MAGIC "LABROW1\n"
#define BLOCK_MAGIC "LABBLK1\n"
#define AREA_MAGIC "LABAREA\n"

struct area {
    int fd;
    uint32_t id;
    uint64_t blocks;
};

struct ledger {
    int rows_fd;
    uint32_t boot;
    uint64_t last;       /* number of the last good row */
    uint32_t last_crc;
    struct area areas[MAX_AREAS];
    int area_count;
};

/* The result of an audit; all but rows, first, last, last_time_us, blocks, written and areas must be 0. */
struct audit {
    uint64_t rows, first, last, last_time_us;
    uint64_t gaps;    /* row numbers absent between first and last */
    uint64_t torn;    /* unreadable sectors after the last good row */
    uint64_t bad;     /* unreadable sectors before it */
    uint64_t forks;   /* rows that do not follow from the row before */
    uint64_t blocks;  /* blocks found whole, written or never written */
    uint64_t written; /* of these, written */
    uint64_t blocks_bad;
    uint64_t behind;  /* blocks older than a row says: this disk is of an earlier instant than the ledger's */
    uint64_t ahead;   /* blocks newer than the last row allows: this disk is of a later instant */
    uint64_t areas, missing; /* areas found; areas that rows speak of but that are not there */
};

uint64_t now_us(void);
void fill_random(void *buffer, size_t bytes, uint64_t seed);

bool ledger_area_open(struct ledger *ledger, const char *path);
int area_create(const char *path, uint32_t id, uint64_t blocks);
/* Reads everything, sets last and last_crc. Returns 0, or an errno. */
int ledger_audit(struct ledger *ledger, struct audit *audit);
/* One step of the workload: a block, flushed, then the row that refers to it, flushed. Returns 0, or an errno. */
int ledger_append(struct ledger *ledger, uint64_t *time_us);

#endif
