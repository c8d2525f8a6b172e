/*
 * The ledger as a service of a complete Debian, the lab's physical server: audits its disks, reports on the serial
 * console and in a file, then runs the workload. Areas and rows are in file systems that are already mounted.
 *
 *   ledgerd run RATE ROWS AREA...     SIGTERM ends it after a complete step
 *   ledgerd audit ROWS AREA...        between two steps of a running one
 *   ledgerd mkarea PATH ID BLOCKS
 */
#define _GNU_SOURCE
#include "../guest/lab.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#define CONSOLE "/dev/ttyS0"
#define AUDIT_FILE "/run/lab-audit"

static volatile sig_atomic_t stopping;
static int console = -1;

static void on_stop(int signal)
{
    (void)signal;
    stopping = 1;
}

static void say(const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    if (write(console, line, (size_t)length) < 0)
        return;
}

static void open_all(struct ledger *ledger, const char *rows, char **areas, int count)
{
    char text[64] = "";
    int fd = open("/proc/sys/kernel/random/uuid", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 8)
        exit(1);
    close(fd);
    *ledger = (struct ledger){.boot = (uint32_t)strtoul(text, NULL, 16)};
    if ((ledger->rows_fd = open(rows, O_RDWR | O_CREAT | O_CLOEXEC, 0644)) < 0) {
        perror(rows);
        exit(1);
    }
    for (int i = 0; i < count; i++)
        if (!ledger_area_open(ledger, areas[i])) {
            fprintf(stderr, "%s: no area\n", areas[i]);
            exit(1);
        }
}

static void audit_line(struct ledger *ledger, char *line, size_t size)
{
    struct audit a;
    uint64_t begun = now_us();
    int failed = ledger_audit(ledger, &a);

    if (failed) {
        snprintf(line, size, "LAB-ERROR audit: %s", strerror(failed));
        return;
    }
    snprintf(line, size,
             "LAB-AUDIT boot=%08x rows=%lu first=%lu last=%lu gaps=%lu torn=%lu bad=%lu forks=%lu "
             "last_time=%lu.%06lu blocks_ok=%lu written=%lu blocks_bad=%lu behind=%lu ahead=%lu areas=%lu missing=%lu "
             "took=%.3f",
             ledger->boot, a.rows, a.first, a.last, a.gaps, a.torn, a.bad, a.forks, a.last_time_us / 1000000,
             a.last_time_us % 1000000, a.blocks, a.written, a.blocks_bad, a.behind, a.ahead, a.areas, a.missing,
             (double)(now_us() - begun) / 1e6);
}

static int run(struct ledger *ledger, double rate)
{
    char line[1024];
    uint64_t time_us;
    struct sigaction stop = {.sa_handler = on_stop};
    struct timespec next;

    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    flock(ledger->rows_fd, LOCK_EX);
    audit_line(ledger, line, sizeof line);
    if (ftruncate(ledger->rows_fd, (off_t)(ledger->last * ROW_BYTES))) /* a torn tail was reported; continue after it */
        return 1;
    flock(ledger->rows_fd, LOCK_UN);
    FILE *kept = fopen(AUDIT_FILE, "we");
    if (kept) {
        fprintf(kept, "%s\n", line);
        fclose(kept);
    }
    say("%s", line);
    say("LAB-READY %08x", ledger->boot);
    clock_gettime(CLOCK_MONOTONIC, &next);
    while (!stopping) {
        flock(ledger->rows_fd, LOCK_EX); /* an audit of another process comes between two turns */
        int failed = ledger_append(ledger, &time_us);
        flock(ledger->rows_fd, LOCK_UN);
        if (failed) {
            say("LAB-ERROR workload after row %lu: %s", ledger->last, strerror(failed));
            return 1;
        }
        say("LAB-ACK %lu %lu.%06lu %08x", ledger->last, time_us / 1000000, time_us % 1000000, ledger->boot);
        next.tv_nsec += (long)(1e9 / rate);
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - next.tv_sec > 1) /* was held up: do not make up for it in a burst */
            next = now;
        while (!stopping && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL) == EINTR)
            ;
    }
    say("LAB-DOWN boot=%08x last=%lu", ledger->boot, ledger->last);
    return 0;
}

int main(int argc, char **argv)
{
    static struct ledger ledger;
    char line[1024];
    int fd;

    if (argc == 5 && !strcmp(argv[1], "mkarea")) {
        int failed = area_create(argv[2], (uint32_t)atoi(argv[3]), strtoull(argv[4], NULL, 10));
        if (failed)
            fprintf(stderr, "%s: %s\n", argv[2], strerror(failed));
        return failed != 0;
    }
    if (argc > 4 && !strcmp(argv[1], "run")) {
        /* Do not wait for a terminal without a reader. */
        console = open(CONSOLE, O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
        open_all(&ledger, argv[3], argv + 4, argc - 4);
        return run(&ledger, atof(argv[2]));
    }
    if (argc > 3 && !strcmp(argv[1], "audit")) {
        open_all(&ledger, argv[2], argv + 3, argc - 3);
        flock(ledger.rows_fd, LOCK_EX);
        sync();
        if ((fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC)) < 0 || write(fd, "3", 1) != 1)
            return 1;
        audit_line(&ledger, line, sizeof line);
        puts(line);
        return strncmp(line, "LAB-AUDIT", 9) != 0;
    }
    return 2;
}
