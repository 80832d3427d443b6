/* A long path between two hosts: two TUN devices, and between them delay, a rate, a queue and loss.

       wan [options] A B             A and B: NAMESPACE/DEVICE, or DEVICE in this namespace

       --delay MS       one way; what a packet waits besides the queue                      [0]
       --rate MBIT      of the line, in IP packets; 10^6 bits a second                      [1000]
       --queue KB       bytes that may wait for the line, in 1000; what comes then is lost  [1000]
       --loss PERCENT   of the packets, each by chance                                      [0]
       --seed N         of that chance: the same packets in the same order lose the same    [1]
       --seconds N      ends by itself after so long                                        [600]

   --delay, --rate, --queue and --loss take one number for both ways, or two, as in --loss 0.5,0: from A to B, then from
   B to A. The devices are made here, and are gone when this ends; addresses and routes are for whoever calls.

   It says "ready" when both devices are there. Each line that comes on stdin is answered with the counts so far, one
   line of JSON; at the end of stdin, after --seconds, and on SIGTERM it says them once more and ends, with status 0. So
   it does not outlive its caller. What it cannot do is one line on stderr, and status 2.

   Where it stands in time: a packet is looked at within TICK of its coming, and leaves within TICK of when it is due,
   as long as the machine gives it a core; "late" says how much later than due the latest left.

   Linux only. Needs CAP_NET_ADMIN, and CAP_SYS_ADMIN to reach other namespaces. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define TICK 100000          /* ns; shorter, and at 500 Mbit/s it does nothing but wake up */
#define LARGEST 65536        /* bytes of an IP packet */
#define NS 1000000000.0
#define READS 256            /* packets in a row from one side */

/* What a packet has before it in the queue. */
struct head {
    double due;
    uint32_t bytes;
};

/* One way. Packets lie one after another in a ring, each whole; `wrap` is where the last one before its end stops. */
struct way {
    double delay, rate, queue, loss; /* s, bytes/s, bytes, 0 to 1 */
    uint64_t chance;
    double free_at; /* when the line has sent all that waits */
    char *ring;
    size_t size, first, last, wrap;
    unsigned long long packets, bytes, lost, dropped, refused;
    double late; /* s */
};

static volatile sig_atomic_t told_to_end;

static void fail(const char *format, ...)
{
    va_list words;
    va_start(words, format);
    fputs("wan: error: ", stderr);
    vfprintf(stderr, format, words);
    fputc('\n', stderr);
    va_end(words);
    exit(2);
}

static void on_term(int number)
{
    (void)number;
    told_to_end = 1;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / NS;
}

/* xorshift64*, in [0, 1). */
static double draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 2685821657736338717ull) >> 11) / 9007199254740992.0;
}

/* Devices. */

static void enter(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail("no network namespace %s: %s", name, strerror(errno));
    if (setns(fd, CLONE_NEWNET) < 0)
        fail("network namespace %s may not be entered: %s", name, strerror(errno));
    close(fd);
}

static int open_device(const char *place, int here)
{
    const char *slash = strchr(place, '/'), *device = slash ? slash + 1 : place;
    if (setns(here, CLONE_NEWNET) < 0 && slash)
        fail("network namespaces may not be entered: %s", strerror(errno));
    if (slash) {
        char name[128];
        snprintf(name, sizeof name, "%.*s", (int)(slash - place), place);
        enter(name);
    }
    if (!*device || strlen(device) >= IFNAMSIZ)
        fail("%s: the name of a device has 1 to %d letters", place, IFNAMSIZ - 1);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        fail("/dev/net/tun: %s (modprobe tun; in a container, --device /dev/net/tun)", strerror(errno));
    struct ifreq wanted = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(wanted.ifr_name, device);
    if (ioctl(fd, TUNSETIFF, &wanted) < 0)
        fail("no TUN device %s: %s%s", place, strerror(errno), errno == EPERM ? " (it needs CAP_NET_ADMIN)" : "");
    return fd;
}

/* The queue. */

static bool is_empty(const struct way *way)
{
    return way->first == way->last;
}

static size_t room_for(size_t bytes)
{
    return (sizeof(struct head) + bytes + 7) & ~(size_t)7;
}

/* Where a packet of so many bytes goes, or NULL when the ring is full; `last` moves behind it. */
static struct head *put(struct way *way, uint32_t bytes)
{
    size_t need = room_for(bytes), at = way->last;
    if (at >= way->first && at + need >= way->size) { /* it does not fit before the end, so it goes to the beginning */
        if (need >= way->first)
            return NULL;
        way->wrap = at;
        at = 0;
    } else if (at < way->first && at + need >= way->first) {
        return NULL;
    }
    way->last = at + need;
    return (struct head *)(way->ring + at);
}

static struct head *oldest(struct way *way)
{
    if (!is_empty(way) && way->first == way->wrap) {
        way->first = 0;
        way->wrap = way->size;
    }
    return is_empty(way) ? NULL : (struct head *)(way->ring + way->first);
}

static void take_in(struct way *way, const char *packet, uint32_t bytes, double came)
{
    way->packets++;
    way->bytes += bytes;
    if (draw(&way->chance) < way->loss) {
        way->lost++;
        return;
    }
    double starts = way->free_at > came ? way->free_at : came;
    struct head *head = (starts - came) * way->rate > way->queue ? NULL : put(way, bytes);
    if (!head) {
        way->dropped++;
        return;
    }
    way->free_at = starts + bytes / way->rate;
    head->due = way->free_at + way->delay;
    head->bytes = bytes;
    memcpy(head + 1, packet, bytes);
}

static void take_in_all(struct way *way, int from)
{
    static char packet[LARGEST];
    double came = now();
    for (int n = 0; n < READS; n++) {
        ssize_t bytes = read(from, packet, sizeof packet);
        if (bytes <= 0)
            return;
        take_in(way, packet, (uint32_t)bytes, came);
    }
}

/* Sends what is due; returns when the next one is, or infinity. */
static double send_due(struct way *way, int to, double time)
{
    struct head *head;
    while ((head = oldest(way)) && head->due <= time) {
        if (time - head->due > way->late)
            way->late = time - head->due;
        if (write(to, head + 1, head->bytes) < 0)
            way->refused++; /* the device is down */
        way->first += room_for(head->bytes);
    }
    return head ? head->due : 1e18;
}

/* What it was told. */

static void read_both(const char *option, const char *text, double least, double most, double *ways)
{
    char *end;
    ways[0] = ways[1] = strtod(text, &end);
    bool both = end > text;
    if (both && *end == ',') {
        char *second = end + 1;
        ways[1] = strtod(second, &end);
        both = end > second;
    }
    for (int i = 0; i < 2; i++)
        if (!both || *end || !(ways[i] >= least && ways[i] <= most))
            fail("--%s %s: give a number from %g to %g, or two with a comma between", option, text, least, most);
}

static void prepare(struct way *way, double delay, double rate, double queue, double loss, uint64_t chance)
{
    *way = (struct way){
        .delay = delay / 1000, .rate = rate * 1e6 / 8, .queue = queue * 1000, .loss = loss / 100, .chance = chance};
    /* All that can be on the way, twice since a small packet's head is as large as itself, and one that did not fit. */
    double bytes = 2 * (way->queue + way->rate * (way->delay + 0.05)) + 2 * LARGEST;
    way->size = way->wrap = (size_t)bytes & ~(size_t)7;
    way->ring = malloc(way->size);
    if (!way->ring)
        fail("no memory for a path that holds %.0f bytes", bytes);
}

static void say_counts(const struct way *ways)
{
    for (int i = 0; i < 2; i++)
        printf("%s{\"packets\": %llu, \"bytes\": %llu, \"lost\": %llu, \"dropped\": %llu, \"refused\": %llu, "
               "\"late\": %.6f}%s",
               i ? ", " : "[", ways[i].packets, ways[i].bytes, ways[i].lost, ways[i].dropped, ways[i].refused,
               ways[i].late, i ? "]\n" : "");
    fflush(stdout);
}

/* Answers each line on stdin; whether there will be more. */
static bool hear(const struct way *ways)
{
    char words[256];
    ssize_t got = read(STDIN_FILENO, words, sizeof words);
    for (ssize_t i = 0; i < got; i++)
        if (words[i] == '\n')
            say_counts(ways);
    return got > 0 || (got < 0 && errno == EINTR);
}

static void carry(struct way *ways, const int *devices, double ends)
{
    struct pollfd watched[3] = {{devices[0], POLLIN, 0}, {devices[1], POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    const struct timespec tick = {0, TICK};
    while (!told_to_end) {
        double time = now(), next = time + 0.1;
        if (time >= ends)
            return;
        for (int i = 0; i < 2; i++) {
            double due = send_due(&ways[i], devices[1 - i], time);
            next = due < next ? due : next;
        }
        double wait = (next - now()) * NS;
        struct timespec until = {0, wait > TICK ? (long)wait : TICK};
        if (ppoll(watched, 3, &until, NULL) > 0) {
            if (watched[2].revents && !hear(ways))
                return;
            nanosleep(&tick, NULL); /* for all that come meanwhile, this wakes up once */
            for (int i = 0; i < 2; i++)
                take_in_all(&ways[i], devices[i]);
        }
    }
}

int main(int count, char **words)
{
    double delay[2] = {0, 0}, rate[2] = {1000, 1000}, queue[2] = {1000, 1000}, loss[2] = {0, 0};
    double seed[2] = {1, 1}, seconds[2] = {600, 600};
    struct {
        const char *name;
        double least, most, *into;
    } options[] = {{"delay", 0, 10000, delay},  {"rate", 0.001, 100000, rate}, {"queue", 1, 1000000, queue},
                   {"loss", 0, 100, loss},      {"seed", 0, 1e15, seed},       {"seconds", 0.001, 86400, seconds}};
    const size_t known = sizeof options / sizeof *options;
    int word = 1;
    for (; word + 1 < count && !strncmp(words[word], "--", 2); word += 2) {
        size_t i = 0;
        while (i < known && strcmp(words[word] + 2, options[i].name))
            i++;
        if (i == known)
            fail("%s is not an option", words[word]);
        read_both(options[i].name, words[word + 1], options[i].least, options[i].most, options[i].into);
    }
    if (count - word != 2)
        fail("give two devices behind the options: wan [options] A B");

    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), devices[2];
    if (here < 0)
        fail("/proc/self/ns/net: %s", strerror(errno));
    struct way ways[2];
    for (int i = 0; i < 2; i++) {
        devices[i] = open_device(words[word + i], here);
        /* No state of xorshift may be 0, and near seeds shall not begin alike. */
        uint64_t chance = ((uint64_t)seed[0] * 2 + (uint64_t)i + 1) * 11400714819323198485ull;
        prepare(&ways[i], delay[i], rate[i], queue[i], loss[i], chance);
    }
    signal(SIGTERM, on_term);
    signal(SIGINT, on_term);
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    /* Late packets are a wrong measurement. It sleeps at least a TICK between two looks, so nobody is locked out. Where
       that is not allowed, it goes like everybody else. */
    sched_setscheduler(0, SCHED_RR, &(struct sched_param){.sched_priority = 1});
    puts("ready");
    fflush(stdout);
    carry(ways, devices, now() + seconds[0]);
    say_counts(ways);
    return 0;
}
