/*
 * The first and only process of a lab guest: loads modules, mounts file systems with a "lab-" label, audits the ledger,
 * prints LAB-READY on the serial console, then runs the workload, and handles the power button and a command channel.
 *
 * On a host, `lab-init mkarea PATH ID BLOCKS` prepares an area, for the build of the images.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define LEDGER_LABEL "lab-ledger"
#define NVRAM_VARIABLE "/sys/firmware/efi/efivars/LabBoots-7c1f1d0c-5d1d-4bd5-9f0e-1e5a5b9c3a10"

static struct ledger ledger = {.rows_fd = -1};
static double rate = 10;
static bool paused, stopping;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;

/* A line in one write, so that lines of several threads do not mix. */
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
    if (write(1, line, (size_t)length) < 0)
        return;
}

static bool read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[got > 0 ? got : 0] = 0;
    text[strcspn(text, "\n")] = 0;
    return got >= 0;
}

static void load_modules(void)
{
    char name[128], path[160];
    FILE *order = fopen("/modules/order", "re");

    while (order && fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        /* "sync": all SCSI disks must be present when the audit starts. */
        if (fd < 0 || (syscall(SYS_finit_module, fd, strcmp(name, "scsi_mod.ko") ? "" : "scan=sync", 0) &&
                       errno != EEXIST && errno != ENODEV)) /* ENODEV: efivarfs on a BIOS */
            say("LAB-ERROR module %s: %s", name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (order)
        fclose(order);
}

static void mount_kernel_views(void)
{
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("tmpfs", "/run", "tmpfs", 0, NULL);
    mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
}

/* Mounts the device if it has an ext4 file system with one of the lab's labels. */
static void mount_labelled(const char *device)
{
    unsigned char super[1024];
    char label[17] = "", target[40];
    int fd = open(device, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return;
    if (pread(fd, super, sizeof super, 1024) == sizeof super && super[0x38] == 0x53 && super[0x39] == 0xEF)
        memcpy(label, super + 0x78, 16);
    close(fd);
    if (strncmp(label, "lab-", 4) || strchr(label, '/'))
        return;
    snprintf(target, sizeof target, "/mnt/%s", label);
    mkdir("/mnt", 0755);
    mkdir(target, 0755);
    if (mount(device, target, "ext4", MS_NOATIME, NULL))
        say("LAB-ERROR mount %s %s: %s", device, label, strerror(errno));
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static void find_disks(char *summary, size_t size)
{
    struct dirent **names;
    char path[320], text[64];
    int count = scandir("/sys/class/block", &names, NULL, by_name);
    size_t used = 0;

    for (int i = 0; i < count; i++) {
        const char *name = names[i]->d_name;
        if (name[0] != '.' && strncmp(name, "loop", 4) && strncmp(name, "ram", 3)) {
            snprintf(path, sizeof path, "/sys/class/block/%s/size", name);
            read_text(path, text, sizeof text);
            if (used < size)
                used += (size_t)snprintf(summary + used, size - used, "%s%s:%llu", used ? "," : "", name,
                                         strtoull(text, NULL, 10) * 512);
            snprintf(path, sizeof path, "/dev/%s", name);
            mount_labelled(path);
            ledger_area_open(&ledger, path);
        }
        free(names[i]);
    }
    if (count >= 0)
        free(names);
}

static void find_area_files(void)
{
    struct dirent **names;
    char path[320];
    int count = scandir("/mnt", &names, NULL, by_name);

    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/mnt/%s/area", names[i]->d_name);
        ledger_area_open(&ledger, path);
        free(names[i]);
    }
    if (count >= 0)
        free(names);
}

/* Counts the boots in a firmware variable, to prove that NVRAM is replicated. Returns the former count, -1 on BIOS. */
static int count_boots_in_nvram(void)
{
    struct {
        uint32_t attributes, boots;
    } __attribute__((packed)) variable = {7, 0}; /* non-volatile, boot and run time */
    char path[] = NVRAM_VARIABLE;
    int flags = 0, before = 0;

    if (access("/sys/firmware/efi", F_OK))
        return -1;
    mount("efivarfs", "/sys/firmware/efi/efivars", "efivarfs", 0, NULL);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (read(fd, &variable, sizeof variable) == sizeof variable)
            before = (int)variable.boots;
        /* The kernel protects variables it does not know from accidental removal. */
        if (!ioctl(fd, _IOR('f', 1, long), &flags)) {
            flags &= ~0x10;
            ioctl(fd, _IOW('f', 2, long), &flags);
        }
        close(fd);
    }
    variable.boots = (uint32_t)before + 1;
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, &variable, sizeof variable) != sizeof variable)
        say("LAB-ERROR nvram: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return before;
}

static void say_hardware(const char *disks)
{
    char line[256], cpu[128] = "?", macs[128] = "", nvram[16] = "-", path[320];
    FILE *info = fopen("/proc/cpuinfo", "re");
    int boots = count_boots_in_nvram();

    while (info && fgets(line, sizeof line, info))
        if (!strncmp(line, "model name", 10)) {
            snprintf(cpu, sizeof cpu, "%s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = 0;
            break;
        }
    if (info)
        fclose(info);
    for (char *c = cpu; *c; c++)
        if (*c == ' ')
            *c = '_';
    struct dirent **names;
    int count = scandir("/sys/class/net", &names, NULL, by_name);
    for (int i = 0; i < count; i++) {
        if (names[i]->d_name[0] != '.' && strcmp(names[i]->d_name, "lo")) {
            snprintf(path, sizeof path, "/sys/class/net/%s/address", names[i]->d_name);
            read_text(path, line, sizeof line);
            size_t used = strlen(macs);
            snprintf(macs + used, sizeof macs - used, "%s%s", used ? "," : "", line);
        }
        free(names[i]);
    }
    if (count >= 0)
        free(names);
    if (boots >= 0)
        snprintf(nvram, sizeof nvram, "%d", boots);
    say("LAB-HARDWARE boot=%08x firmware=%s nvram=%s cpu=%s macs=%s disks=%s", ledger.boot, boots < 0 ? "bios" : "uefi",
        nvram, cpu, macs[0] ? macs : "-", disks);
}

static void audit_line(char *line, size_t size)
{
    struct audit a;
    uint64_t begun = now_us();
    int failed = ledger.rows_fd < 0 ? ENOENT : ledger_audit(&ledger, &a);

    if (failed) {
        snprintf(line, size, "LAB-ERROR audit: %s", strerror(failed));
        return;
    }
    snprintf(line, size,
             "LAB-AUDIT boot=%08x rows=%lu first=%lu last=%lu gaps=%lu torn=%lu bad=%lu forks=%lu "
             "last_time=%lu.%06lu blocks_ok=%lu written=%lu blocks_bad=%lu behind=%lu ahead=%lu areas=%lu missing=%lu "
             "took=%.3f",
             ledger.boot, a.rows, a.first, a.last, a.gaps, a.torn, a.bad, a.forks, a.last_time_us / 1000000,
             a.last_time_us % 1000000, a.blocks, a.written, a.blocks_bad, a.behind, a.ahead, a.areas, a.missing,
             (double)(now_us() - begun) / 1e6);
}

static void *workload(void *unused)
{
    uint64_t time_us;
    struct timespec next;

    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &next);
    pthread_mutex_lock(&turn);
    while (!stopping) {
        if (paused || rate <= 0) {
            pthread_cond_wait(&changed, &turn);
            clock_gettime(CLOCK_MONOTONIC, &next);
            continue;
        }
        int failed = ledger_append(&ledger, &time_us);
        if (failed) {
            say("LAB-ERROR workload after row %lu: %s", ledger.last, strerror(failed));
            paused = true;
            continue;
        }
        say("LAB-ACK %lu %lu.%06lu %08x", ledger.last, time_us / 1000000, time_us % 1000000, ledger.boot);
        next.tv_nsec += (long)(1e9 / rate);
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - next.tv_sec > 1) /* was held up: do not make up for it in a burst */
            next = now;
        while (!stopping && pthread_cond_timedwait(&changed, &turn, &next) != ETIMEDOUT)
            ;
    }
    pthread_mutex_unlock(&turn);
    return NULL;
}

/* Shuts the machine down. Everything the workload acknowledged is on the disks before the last line is printed. */
static void power_off(void)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    struct dirent **names;
    char path[320];

    pthread_mutex_lock(&once);
    pthread_mutex_lock(&turn);
    stopping = true;
    pthread_cond_broadcast(&changed);
    for (int i = 0; i < ledger.area_count; i++) {
        fsync(ledger.areas[i].fd);
        close(ledger.areas[i].fd);
    }
    if (ledger.rows_fd >= 0)
        close(ledger.rows_fd);
    sync();
    int count = scandir("/mnt", &names, NULL, by_name);
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/mnt/%s", names[i]->d_name);
        if (names[i]->d_name[0] != '.' && umount2(path, 0) && mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL))
            say("LAB-ERROR umount %s: %s", path, strerror(errno));
    }
    sync();
    say("LAB-DOWN boot=%08x last=%lu", ledger.boot, ledger.last);
    tcdrain(1);
    reboot(RB_POWER_OFF);
}

static struct pollfd buttons[16];
static nfds_t button_count;

/* Before LAB-READY: a press before the device is opened is lost, and the guest would keep running. */
static void open_buttons(void)
{
    struct dirent **names;
    char path[320];
    int count = scandir("/dev/input", &names, NULL, by_name);

    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/dev/input/%s", names[i]->d_name);
        if (!strncmp(names[i]->d_name, "event", 5) && button_count < 16 &&
            (buttons[button_count].fd = open(path, O_RDONLY | O_CLOEXEC)) >= 0)
            buttons[button_count++].events = POLLIN;
        free(names[i]);
    }
    if (count >= 0)
        free(names);
}

static void *power_button(void *unused)
{
    (void)unused;
    while (button_count && poll(buttons, button_count, -1) > 0)
        for (nfds_t i = 0; i < button_count; i++) {
            struct input_event event;
            if (buttons[i].revents & POLLIN && read(buttons[i].fd, &event, sizeof event) == sizeof event &&
                event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
                power_off();
        }
    return NULL;
}

static bool virtio_port(const char *wanted, char *device, size_t size)
{
    struct dirent **names;
    char path[320], name[64];
    bool found = false;
    int count = scandir("/sys/class/virtio-ports", &names, NULL, by_name);

    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", names[i]->d_name);
        if (!found && read_text(path, name, sizeof name) && !strcmp(name, wanted)) {
            snprintf(device, size, "/dev/%s", names[i]->d_name);
            found = true;
        }
        free(names[i]);
    }
    if (count >= 0)
        free(names);
    return found;
}

/* Writes incompressible random data: `fill PATH OFFSET_MIB MIB`. */
static int fill(const char *path, uint64_t offset_mib, uint64_t mib)
{
    static char buffer[1 << 20];
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644), failed = fd < 0 ? errno : 0;

    for (uint64_t i = 0; i < mib && !failed; i++) {
        fill_random(buffer, sizeof buffer, now_us() + i);
        if (pwrite(fd, buffer, sizeof buffer, (off_t)((offset_mib + i) << 20)) != sizeof buffer)
            failed = errno ? errno : EIO;
    }
    if (fd >= 0 && (fsync(fd) || close(fd)) && !failed)
        failed = errno;
    return failed;
}

static void set_pause(bool value)
{
    pthread_mutex_lock(&turn); /* held by the workload through a whole turn: after this no row is half done */
    paused = value;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&turn);
    if (value)
        sync();
}

/* Runs one line; sends its output to the host, then "LAB-DONE <exit status>". */
static void obey(const char *line, FILE *host)
{
    char text[1024];
    unsigned long offset, mib;
    int status = 0;

    if (!strcmp(line, "pause") || !strcmp(line, "resume"))
        set_pause(line[0] == 'p');
    else if (sscanf(line, "rate %lf", &rate) == 1)
        set_pause(paused);
    else if (!strcmp(line, "audit")) {
        pthread_mutex_lock(&turn);
        sync();
        int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
        status = fd < 0 || write(fd, "3", 1) != 1;
        close(fd);
        audit_line(text, sizeof text);
        pthread_mutex_unlock(&turn);
        fprintf(host, "%s\n", text);
    } else if (sscanf(line, "fill %1000s %lu %lu", text, &offset, &mib) == 3) {
        status = fill(text, offset, mib);
        if (status)
            fprintf(host, "fill %s: %s\n", text, strerror(status));
    } else if (!strcmp(line, "poweroff"))
        power_off();
    else {
        int got;
        snprintf(text, sizeof text, "exec 2>&1; %.1000s", line);
        FILE *child = popen(text, "re");
        while (child && (got = fgetc(child)) != EOF)
            fputc(got, host);
        status = child ? pclose(child) : -1;
        status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    }
    fprintf(host, "LAB-DONE %d\n", status);
    fflush(host);
}

static void *command_channel(void *unused)
{
    char device[64], line[1024];
    size_t used = 0;
    int fd;

    (void)unused;
    if (!virtio_port("lab.command", device, sizeof device) || (fd = open(device, O_RDWR | O_CLOEXEC)) < 0)
        return NULL;
    FILE *host = fdopen(dup(fd), "we");
    for (;;) {
        char byte;
        if (read(fd, &byte, 1) == 1) {
            if (byte != '\n' && used < sizeof line - 1)
                line[used++] = byte;
            else if (byte == '\n') {
                line[used] = 0;
                used = 0;
                obey(line, host);
            }
        } else {
            /* No connection from the host; the kernel then neither blocks nor wakes a reader. */
            struct timespec nap = {0, 50000000};
            used = 0;
            nanosleep(&nap, NULL);
        }
    }
    return NULL;
}

static void start_guest_agent(void)
{
    char device[64];

    if (access("/usr/sbin/qemu-ga", X_OK) || !virtio_port("org.qemu.guest_agent.0", device, sizeof device))
        return;
    if (fork() == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        dup2(null, 2);
        execl("/usr/sbin/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", device, "-t", "/run", NULL);
        _exit(127);
    }
}

/* The machine's description contains the settings, so that they are the same however the guest boots. */
static void read_settings(void)
{
    char text[128];
    if (read_text("/sys/class/dmi/id/product_version", text, sizeof text))
        sscanf(text, "rate=%lf", &rate);
}

static void on_request(int signal)
{
    (void)signal; /* only to interrupt pause() */
}

int main(int argc, char **argv)
{
    char line[1024], disks[512] = "-";
    pthread_t thread;
    pthread_condattr_t monotonic;

    if (argc == 5 && !strcmp(argv[1], "mkarea")) {
        int failed = area_create(argv[2], (uint32_t)atoi(argv[3]), strtoull(argv[4], NULL, 10));
        if (failed)
            fprintf(stderr, "%s: %s\n", argv[2], strerror(failed));
        return failed != 0;
    }
    if (getpid() != 1)
        return 2;
    mount_kernel_views();
    read_settings();
    read_text("/proc/sys/kernel/random/uuid", line, sizeof line);
    ledger.boot = (uint32_t)strtoul(line, NULL, 16);
    say(""); /* the firmware's last line may be unfinished */
    load_modules();
    setenv("PATH", "/bin:/usr/sbin", 1);
    find_disks(disks, sizeof disks);
    find_area_files();
    say_hardware(disks);
    ledger.rows_fd = open("/mnt/" LEDGER_LABEL "/rows", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    audit_line(line, sizeof line);
    say("%s", line);
    if (ftruncate(ledger.rows_fd, (off_t)(ledger.last * ROW_BYTES))) /* a torn tail was reported; continue after it */
        paused = true;
    open_buttons();
    say("LAB-READY %08x", ledger.boot);

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &monotonic);
    signal(SIGTERM, on_request);
    pthread_create(&thread, NULL, power_button, NULL);
    pthread_create(&thread, NULL, command_channel, NULL);
    pthread_create(&thread, NULL, workload, NULL);
    start_guest_agent();
    pause(); /* SIGTERM comes from /sbin/shutdown, which the guest agent calls */
    power_off();
}
