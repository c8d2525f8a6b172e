/* The ledger: rows in order, and areas of blocks overwritten at random. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static uint32_t crc_table[8][256];

static void crc_prepare(void)
{
    if (crc_table[0][1])
        return;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
        crc_table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            crc_table[k][i] = (crc_table[k - 1][i] >> 8) ^ crc_table[0][crc_table[k - 1][i] & 0xFF];
}

/* CRC-32, eight bytes at a time: an audit reads every block, and an emulated processor is slow. */
static uint32_t crc32(const void *buffer, size_t bytes)
{
    const uint8_t *p = buffer;
    uint32_t crc = ~0u;

    crc_prepare();
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = crc_table[7][low & 0xFF] ^ crc_table[6][(low >> 8) & 0xFF] ^ crc_table[5][(low >> 16) & 0xFF] ^
              crc_table[4][low >> 24] ^ crc_table[3][high & 0xFF] ^ crc_table[2][(high >> 8) & 0xFF] ^
              crc_table[1][(high >> 16) & 0xFF] ^ crc_table[0][high >> 24];
    }
    while (bytes--)
        crc = (crc >> 8) ^ crc_table[0][(crc ^ *p++) & 0xFF];
    return ~crc;
}

uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

void fill_random(void *buffer, size_t bytes, uint64_t seed)
{
    uint64_t state = seed * 0x9E3779B97F4A7C15u | 1;
    uint8_t *p = buffer;

    while (bytes) {
        uint64_t value = next_random(&state);
        size_t take = bytes < 8 ? bytes : 8;
        memcpy(p, &value, take);
        p += take;
        bytes -= take;
    }
}

static bool is_zero(const void *buffer, size_t bytes)
{
    const uint8_t *p = buffer;
    return p[0] == 0 && memcmp(p, p + 1, bytes - 1) == 0;
}

static uint32_t row_crc(const struct row *row)
{
    return crc32(row, offsetof(struct row, crc));
}

static uint32_t block_crc(const struct block *block)
{
    return crc32(block, offsetof(struct block, crc));
}

static bool row_good(const struct row *row, uint64_t number)
{
    return memcmp(row->magic, ROW_MAGIC, 8) == 0 && row->number == number && row->crc == row_crc(row);
}

int area_create(const char *path, uint32_t id, uint64_t blocks)
{
    struct block header = {.area = id, .version = blocks};
    int fd = open(path, O_WRONLY | O_CREAT, 0644);
    struct stat info;
    int failed = 0;

    if (fd < 0)
        return errno;
    memcpy(header.magic, AREA_MAGIC, 8);
    header.crc = block_crc(&header);
    if (pwrite(fd, &header, sizeof header, 0) != sizeof header || fstat(fd, &info))
        failed = errno ? errno : EIO;
    else if (S_ISREG(info.st_mode) && info.st_size < (off_t)((blocks + 1) * BLOCK_BYTES))
        failed = ftruncate(fd, (off_t)((blocks + 1) * BLOCK_BYTES)) ? errno : 0;
    if (close(fd) && !failed)
        failed = errno;
    return failed;
}

bool ledger_area_open(struct ledger *ledger, const char *path)
{
    struct block header;
    struct area *area = &ledger->areas[ledger->area_count];
    int fd;

    if (ledger->area_count == MAX_AREAS || (fd = open(path, O_RDWR | O_CLOEXEC)) < 0)
        return false;
    if (pread(fd, &header, sizeof header, 0) != sizeof header || memcmp(header.magic, AREA_MAGIC, 8) ||
        header.crc != block_crc(&header) || header.version == 0 || header.version > MAX_BLOCKS ||
        header.area >= MAX_AREAS) {
        close(fd);
        return false;
    }
    *area = (struct area){.fd = fd, .id = header.area, .blocks = header.version};
    ledger->area_count++;
    return true;
}

static struct area *area_by_id(struct ledger *ledger, uint32_t id)
{
    for (int i = 0; i < ledger->area_count; i++)
        if (ledger->areas[i].id == id)
            return &ledger->areas[i];
    return NULL;
}

/* newest[area id] holds, for each block of the area, the last row that refers to it. */
static int audit_rows(struct ledger *ledger, struct audit *found, uint64_t *newest[MAX_AREAS])
{
    enum { AT_ONCE = 1024 };
    static struct row rows[AT_ONCE];
    bool absent[MAX_AREAS] = {false};
    uint64_t sector = 0, unreadable = 0;
    ssize_t got;

    ledger->last = ledger->last_crc = 0;
    while ((got = pread(ledger->rows_fd, rows, sizeof rows, (off_t)(sector * ROW_BYTES))) > 0) {
        for (ssize_t at = 0; at < got; at += ROW_BYTES, sector++) {
            const struct row *row = &rows[at / ROW_BYTES];
            if (got - at < ROW_BYTES || !row_good(row, sector + 1)) {
                unreadable++;
                continue;
            }
            found->bad += unreadable;
            found->gaps += row->number - ledger->last - 1;
            if (row->number == ledger->last + 1 && row->previous != ledger->last_crc)
                found->forks++;
            unreadable = 0;
            if (!found->rows++)
                found->first = row->number;
            ledger->last = row->number;
            ledger->last_crc = row->crc;
            found->last_time_us = row->time_us;
            struct area *area = row->area < MAX_AREAS ? area_by_id(ledger, row->area) : NULL;
            if (area && row->block < area->blocks)
                newest[row->area][row->block] = row->number;
            else if (row->area < MAX_AREAS && !absent[row->area]) {
                absent[row->area] = true;
                found->missing++;
            }
        }
        if (got % ROW_BYTES)
            break;
    }
    found->torn = unreadable;
    found->last = ledger->last;
    return got < 0 ? errno : 0;
}

static int audit_area(const struct area *area, uint64_t last, const uint64_t *newest, struct audit *found)
{
    enum { AT_ONCE = 64 };
    static struct block blocks[AT_ONCE];

    for (uint64_t first = 0; first < area->blocks; first += AT_ONCE) {
        uint64_t count = area->blocks - first < AT_ONCE ? area->blocks - first : AT_ONCE;
        ssize_t bytes = (ssize_t)(count * BLOCK_BYTES);
        ssize_t got = pread(area->fd, blocks, (size_t)bytes, (off_t)((first + 1) * BLOCK_BYTES));
        if (got != bytes)
            return got < 0 ? errno : EIO;
        for (uint64_t i = 0; i < count; i++) {
            const struct block *block = &blocks[i];
            uint64_t version = 0;
            if (!is_zero(block, BLOCK_BYTES)) {
                if (memcmp(block->magic, BLOCK_MAGIC, 8) || block->area != area->id ||
                    block->block != first + i || block->crc != block_crc(block)) {
                    found->blocks_bad++;
                    continue;
                }
                version = block->version;
                found->written++;
            }
            found->blocks++;
            if (version < newest[first + i])
                found->behind++;
            if (version > last + 1)
                found->ahead++;
        }
    }
    return 0;
}

int ledger_audit(struct ledger *ledger, struct audit *found)
{
    uint64_t *newest[MAX_AREAS] = {NULL};
    int failed = 0;

    memset(found, 0, sizeof *found);
    found->areas = (uint64_t)ledger->area_count;
    for (int i = 0; i < ledger->area_count; i++)
        if (!(newest[ledger->areas[i].id] = calloc(ledger->areas[i].blocks, sizeof(uint64_t))))
            failed = ENOMEM;
    if (!failed)
        failed = audit_rows(ledger, found, newest);
    for (int i = 0; i < ledger->area_count && !failed; i++)
        failed = audit_area(&ledger->areas[i], ledger->last, newest[ledger->areas[i].id], found);
    for (int i = 0; i < MAX_AREAS; i++)
        free(newest[i]);
    return failed;
}

int ledger_append(struct ledger *ledger, uint64_t *time_us)
{
    static uint64_t random_state;
    static struct block block;
    struct row row = {.number = ledger->last + 1, .boot = ledger->boot, .previous = ledger->last_crc};

    if (!random_state)
        random_state = now_us() ^ ((uint64_t)ledger->boot << 32) ^ 1;
    memcpy(row.magic, ROW_MAGIC, 8);
    row.area = UINT32_MAX;
    if (ledger->area_count) {
        const struct area *area = &ledger->areas[next_random(&random_state) % (uint64_t)ledger->area_count];
        memset(&block, 0, sizeof block);
        memcpy(block.magic, BLOCK_MAGIC, 8);
        block.area = row.area = area->id;
        block.block = row.block = next_random(&random_state) % area->blocks;
        block.version = row.number;
        block.time_us = now_us();
        fill_random(block.filler, sizeof block.filler, block.version);
        block.crc = block_crc(&block);
        if (pwrite(area->fd, &block, sizeof block, (off_t)((row.block + 1) * BLOCK_BYTES)) != sizeof block ||
            fdatasync(area->fd))
            return errno ? errno : EIO;
    }
    row.time_us = now_us();
    fill_random(row.filler, sizeof row.filler, row.number);
    row.crc = row_crc(&row);
    if (pwrite(ledger->rows_fd, &row, sizeof row, (off_t)(ledger->last * ROW_BYTES)) != sizeof row ||
        fdatasync(ledger->rows_fd))
        return errno ? errno : EIO;
    ledger->last = row.number;
    ledger->last_crc = row.crc;
    *time_us = row.time_us;
    return 0;
}
