/* load: the clients of the benchmark, cheap enough to load a relay from one core.
 *
 *   load traffic --port P [--listen L] [--pairs N] [--copy] [--ping] [--gap-us G] [--seconds S] [--cpu-of PID]...
 *   load pairs   --port P [--concurrent C] [--seconds S] [--count N]
 *   load hold    --port P
 *
 * traffic  N pairs send as fast as they can for S seconds, then end their streams; with --ping one more pair exchanges
 *          16 byte round trips meanwhile. Every byte sent has to arrive. --cpu-of: whose CPU time to count meanwhile.
 * pairs    pairs that connect, shake hands, get `ok`, send 16 bytes each way, and close; C of them at any time.
 * hold     obeys lines on stdin: `waiters N` and `pairs N` add clients that stay, `verify N` shows that N of them still
 *          work, `quit`. Answers each with a line of JSON.
 *
 * With --listen L the receiving sides are not clients of a relay: they are what a plain proxy (or nobody at all) in
 * front of port L connects to, and nobody shakes hands.
 *
 * Results are one line of JSON on stdout. Whatever goes wrong is one line on stderr and exit status 1.
 *
 * What makes it cheap: bytes come from a memory file by sendfile and are thrown away in the kernel by MSG_TRUNC, so the
 * driver copies none. (With --copy it sends from its own memory, as a real client does: the kernel then has the bytes in
 * pages of 32 KiB instead of 4, which all that splice are glad of.) Clients come from many loopback addresses, so that neither the search for a free port nor
 * TIME_WAIT limits the pairs a second.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    PING = 16,                  /* bytes of one ping, and what each side of a short pair sends */
    TOKEN = 64,                 /* hex digits */
    HANDSHAKE = 13 + TOKEN + 10 + 16 + 1,
    STALL_SECONDS = 20,         /* nothing may keep a client waiting longer */
    SOURCE_ADDRESSES = 200,     /* 127.1.0.1 ... , used in turn */
    SEND_CHUNK = 1 << 20,       /* bytes offered to one sendfile call */
    COPY_CHUNK = 256 << 10,     /* bytes offered to one send call; they stay in the cache */
    DISCARD_CHUNK = 4 << 20,    /* bytes thrown away by one recv call */
    MEMORY_FILE = 4 << 20,
    MOST_CPU_PIDS = 16,
    EVENTS = 256,
    PACE = 16,                  /* waiting clients sent ahead before a pair shows that the relay has kept up */
};

static const double WARM_UP = 0.1; /* seconds of load before the first ping */

struct options {
    int port;
    int listen;                 /* 0: both sides are clients of a relay */
    int pairs;
    int concurrent;
    long count;                 /* pairs mode: stop after so many; 0: --seconds decides */
    int gap_us;                 /* longest random pause between pings */
    bool ping, copy;
    double seconds;
    int cpu_pids[MOST_CPU_PIDS];
    int cpu_pid_count;
};

static void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static void must(bool held, const char *what)
{
    if (!held)
        die("%s: %s", what, strerror(errno));
}

static double seconds_of(clockid_t clock)
{
    struct timespec now;
    if (clock_gettime(clock, &now) != 0)
        die("no such clock: is the process still alive?");
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double now(void)
{
    return seconds_of(CLOCK_MONOTONIC);
}

/* CPU seconds that a process has used, all its threads, ended ones too, to the nanosecond. */
static double cpu_of(const struct options *options)
{
    double total = 0;
    for (int i = 0; i < options->cpu_pid_count; i++) {
        clockid_t clock;
        if (clock_getcpuclockid(options->cpu_pids[i], &clock) != 0)
            die("no CPU clock of process %d", options->cpu_pids[i]);
        total += seconds_of(clock);
    }
    return total;
}

static uint64_t random_bits(void)
{
    static _Thread_local uint64_t state;
    if (state == 0)
        must(getrandom(&state, sizeof state, 0) == sizeof state, "getrandom");
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* ---- sockets ---- */

static struct sockaddr_in loopback(int port, uint32_t host)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(host);
    return address;
}

/* A socket bound to the next of the source addresses; its port is chosen by connect. */
static int client_socket(int flags)
{
    static uint32_t turn;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), yes = 1;
    must(fd >= 0, "socket");
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
    struct sockaddr_in source = loopback(0, 0x7f010001u + turn++ % SOURCE_ADDRESSES);
    must(bind(fd, (struct sockaddr *)&source, sizeof source) == 0, "bind to a 127.1.0.0/16 address");
    return fd;
}

static void never_stall(int fd)
{
    struct timeval limit = {.tv_sec = STALL_SECONDS};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

static int connect_to(int port)
{
    int fd = client_socket(0);
    struct sockaddr_in relay = loopback(port, INADDR_LOOPBACK);
    never_stall(fd);
    must(connect(fd, (struct sockaddr *)&relay, sizeof relay) == 0, "connect");
    return fd;
}

static int listen_on(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_in address = loopback(port, INADDR_LOOPBACK);
    must(fd >= 0, "socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    must(bind(fd, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    must(listen(fd, 128) == 0, "listen");
    never_stall(fd);
    return fd;
}

static void send_all(int fd, const void *bytes, size_t size)
{
    if (send(fd, bytes, size, MSG_NOSIGNAL) != (ssize_t)size)
        die("a client could not send %zu bytes: %s", size, strerror(errno));
}

static void expect(int fd, const char *wanted, size_t size, const char *what)
{
    char got[64];
    ssize_t count = recv(fd, got, size, MSG_WAITALL);
    if (count < 0)
        die("waiting for %s: %s", what, strerror(errno));
    if ((size_t)count != size || memcmp(got, wanted, size) != 0)
        die("waiting for %s: got %zd other bytes or the end", what, count);
}

/* ---- handshakes ---- */

static void new_token(char token[TOKEN])
{
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < TOKEN; i += 16) {
        uint64_t bits = random_bits();
        for (int k = 0; k < 16; k++, bits >>= 4)
            token[i + k] = digits[bits & 15];
    }
}

static void write_handshake(char line[HANDSHAKE], const char token[TOKEN], int side)
{
    memcpy(line, "please relay ", 13);
    memcpy(line + 13, token, TOKEN);
    memcpy(line + 13 + TOKEN, " for side 0000000000000000\n", 27);
    line[13 + TOKEN + 10] = (char)('0' + side);
}

static int shake_hands(int port, const char token[TOKEN], int side)
{
    char line[HANDSHAKE];
    int fd = connect_to(port);
    write_handshake(line, token, side);
    send_all(fd, line, sizeof line);
    return fd;
}

struct ends {
    int sender, receiver;
};

/* Two clients with a relay between them, both told `ok`. */
static struct ends relayed_pair(int port)
{
    char token[TOKEN];
    new_token(token);
    struct ends ends = {.sender = shake_hands(port, token, 1)};
    ends.receiver = shake_hands(port, token, 2);
    expect(ends.sender, "ok\n", 3, "ok");
    expect(ends.receiver, "ok\n", 3, "ok");
    return ends;
}

/* A client, and what a proxy connected to our listening socket on its behalf. */
static struct ends proxied_pair(int port, int listener)
{
    struct ends ends = {.sender = connect_to(port)};
    ends.receiver = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    must(ends.receiver >= 0, "accept what the proxy connects");
    never_stall(ends.receiver);
    return ends;
}

static struct ends new_pair(const struct options *options, int listener)
{
    return options->listen ? proxied_pair(options->port, listener) : relayed_pair(options->port);
}

/* ---- traffic ---- */

struct bulk {
    struct ends ends;
    uint64_t sent, received;
};

struct pinger {
    struct ends ends;
    int gap_us;
    double from, until;
    bool realtime;              /* the figure is then free of this machine's scheduler */
    uint32_t *nanoseconds;
    size_t count, room;
};

static void nodelay(int fd)
{
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

static double round_trip(const struct ends *ends, uint64_t number)
{
    char ping[PING] = "ping";
    memcpy(ping + 8, &number, sizeof number);
    double start = now();
    send_all(ends->sender, ping, sizeof ping);
    expect(ends->receiver, ping, sizeof ping, "a ping");
    ping[1] = 'o';
    send_all(ends->receiver, ping, sizeof ping);
    expect(ends->sender, ping, sizeof ping, "a pong");
    return now() - start;
}

static void pause_at_random(int longest_us)
{
    if (longest_us > 0) {
        struct timespec pause = {.tv_nsec = (long)(random_bits() % (uint64_t)longest_us) * 1000};
        nanosleep(&pause, NULL);
    }
}

static void keep_sample(struct pinger *pinger, double seconds)
{
    if (pinger->count == pinger->room) {
        pinger->room = pinger->room ? pinger->room * 2 : 1 << 16;
        pinger->nanoseconds = realloc(pinger->nanoseconds, pinger->room * sizeof *pinger->nanoseconds);
        must(pinger->nanoseconds != NULL, "memory for samples");
    }
    pinger->nanoseconds[pinger->count++] = seconds < 4.2 ? (uint32_t)(seconds * 1e9) : UINT32_MAX;
}

/* A thread of its own, with precedence where that is allowed: a ping waits for the relay, not for the bulk clients. */
static void *keep_pinging(void *argument)
{
    struct pinger *pinger = argument;
    struct sched_param first = {.sched_priority = 1};
    pinger->realtime = pthread_setschedparam(pthread_self(), SCHED_FIFO, &first) == 0;
    for (uint64_t number = 0; now() < pinger->until; number++) {
        double took = round_trip(&pinger->ends, number);
        if (now() >= pinger->from)
            keep_sample(pinger, took);
        pause_at_random(pinger->gap_us);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile_us(const uint32_t *sorted, size_t count, double share)
{
    if (count == 0)
        return 0;
    size_t rank = (size_t)(share * (double)count);
    return sorted[rank < count ? rank : count - 1] / 1e3;
}

static void print_samples(const char *name, uint32_t *nanoseconds, size_t count)
{
    qsort(nanoseconds, count, sizeof *nanoseconds, by_size);
    printf("\"%s\": {\"count\": %zu, \"p50_us\": %.3f, \"p90_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f}", name, count,
           percentile_us(nanoseconds, count, 0.5), percentile_us(nanoseconds, count, 0.9),
           percentile_us(nanoseconds, count, 0.99), percentile_us(nanoseconds, count, 1.0));
}

static void watch(int epoll, int fd, uint32_t events, uint64_t what)
{
    struct epoll_event event = {.events = events, .data = {.u64 = what}};
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
}

static void unwatch(int epoll, int fd)
{
    must(epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL) == 0, "epoll_ctl");
}

static void end_stream(int epoll, struct bulk *bulk)
{
    unwatch(epoll, bulk->ends.sender);
    must(shutdown(bulk->ends.sender, SHUT_WR) == 0, "shutdown");
}

/* Where the bytes come from: a file in memory, or memory. */
struct source {
    int file;
    char *memory;
};

static void push(struct bulk *bulk, const struct source *source)
{
    off_t offset = (off_t)(bulk->sent % MEMORY_FILE);
    ssize_t count = source->memory ? send(bulk->ends.sender, source->memory, COPY_CHUNK, MSG_NOSIGNAL)
                                   : sendfile(bulk->ends.sender, source->file, &offset, SEND_CHUNK);
    if (count > 0)
        bulk->sent += (uint64_t)count;
    else if (errno != EAGAIN)
        die("a sender: %s", strerror(errno));
}

/* Returns false at the end of the stream. */
static bool discard(struct bulk *bulk)
{
    ssize_t count = recv(bulk->ends.receiver, NULL, DISCARD_CHUNK, MSG_TRUNC | MSG_DONTWAIT);
    if (count < 0 && errno == EAGAIN)
        return true;
    must(count >= 0, "a receiver");
    bulk->received += (uint64_t)count;
    return count > 0;
}

static int memory_file(void)
{
    int fd = memfd_create("load", MFD_CLOEXEC);
    must(fd >= 0, "memfd_create");
    char block[4096];
    for (int written = 0; written < MEMORY_FILE; written += (int)sizeof block) {
        for (size_t i = 0; i < sizeof block; i += 8) {
            uint64_t bits = random_bits();
            memcpy(block + i, &bits, 8);
        }
        must(write(fd, block, sizeof block) == sizeof block, "write");
    }
    return fd;
}

static void watch_bulk(int epoll, struct bulk *bulks, int count)
{
    for (int i = 0; i < count; i++) {
        int flags = fcntl(bulks[i].ends.sender, F_GETFL);
        must(fcntl(bulks[i].ends.sender, F_SETFL, flags | O_NONBLOCK) == 0, "fcntl");
        watch(epoll, bulks[i].ends.sender, EPOLLOUT, (uint64_t)i * 2);
        watch(epoll, bulks[i].ends.receiver, EPOLLIN, (uint64_t)i * 2 + 1);
    }
}

/* Sends until the given time, then ends all streams and receives to their ends. */
static void move_bulk(struct bulk *bulks, int count, const struct source *source, double until)
{
    struct epoll_event events[EVENTS];
    int epoll = epoll_create1(EPOLL_CLOEXEC), open = count;
    bool sending = true;
    watch_bulk(epoll, bulks, count);
    while (open > 0) {
        int ready = epoll_wait(epoll, events, EVENTS, STALL_SECONDS * 1000);
        must(ready >= 0 || errno == EINTR, "epoll_wait");
        if (ready == 0)
            die("no byte moved for %d seconds; %d of %d streams still open", STALL_SECONDS, open, count);
        for (int i = 0; i < ready; i++) {
            struct bulk *bulk = &bulks[events[i].data.u64 / 2];
            if (events[i].data.u64 % 2 == 1) {
                if (!discard(bulk)) {
                    unwatch(epoll, bulk->ends.receiver);
                    open--;
                }
            } else if (sending) {
                push(bulk, source);
            }
        }
        if (sending && now() >= until) {
            sending = false;
            for (int i = 0; i < count; i++)
                end_stream(epoll, &bulks[i]);
        }
    }
    close(epoll);
}

static uint64_t checked_bytes(const struct bulk *bulks, int count)
{
    uint64_t total = 0;
    for (int i = 0; i < count; i++) {
        if (bulks[i].sent != bulks[i].received)
            die("pair %d: %llu bytes sent, %llu received", i, (unsigned long long)bulks[i].sent,
                (unsigned long long)bulks[i].received);
        total += bulks[i].received;
    }
    return total;
}

static void run_traffic(const struct options *options)
{
    int listener = options->listen ? listen_on(options->listen) : -1;
    struct bulk *bulks = calloc((size_t)options->pairs + 1, sizeof *bulks);
    struct pinger pinger = {.gap_us = options->gap_us};
    pthread_t thread;
    must(bulks != NULL, "memory");
    for (int i = 0; i < options->pairs; i++)
        bulks[i].ends = new_pair(options, listener);
    if (options->ping) {
        pinger.ends = new_pair(options, listener);
        nodelay(pinger.ends.sender);
        nodelay(pinger.ends.receiver);
    }
    struct source source = {.file = memory_file(), .memory = options->copy ? calloc(1, COPY_CHUNK) : NULL};
    double relay_cpu = cpu_of(options), own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), start = now();
    pinger.from = start + WARM_UP;
    pinger.until = start + options->seconds;
    if (options->ping)
        must(pthread_create(&thread, NULL, keep_pinging, &pinger) == 0, "pthread_create");
    move_bulk(bulks, options->pairs, &source, start + options->seconds);
    double bulk_seconds = now() - start;
    if (options->ping)
        pthread_join(thread, NULL);
    relay_cpu = cpu_of(options) - relay_cpu;
    own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - own_cpu;
    printf("{\"bytes\": %llu, \"seconds\": %.6f, \"relay_cpu\": %.9f, \"own_cpu\": %.9f",
           (unsigned long long)checked_bytes(bulks, options->pairs), bulk_seconds, relay_cpu, own_cpu);
    if (options->ping) {
        printf(", \"realtime\": %s, ", pinger.realtime ? "true" : "false");
        print_samples("round_trip", pinger.nanoseconds, pinger.count);
    }
    puts("}");
}

/* ---- pairs a second ---- */

struct client {
    int fd;
    struct client *partner;
    bool greeted;               /* our handshake is sent */
    bool answered;              /* our 16 bytes are sent */
    int got;                    /* of `ok\n` and the partner's 16 bytes */
    char reply[3 + PING];
    char handshake[HANDSHAKE];
    double started;             /* of the pair */
};

struct pairing {
    const struct options *options;
    int epoll;
    double until;
    long begun, finished;
    struct pinger met;          /* seconds from the first connect to the second `ok` */
};

static void greet(struct client *client)
{
    ssize_t count = send(client->fd, client->handshake, HANDSHAKE, MSG_NOSIGNAL);
    if (count == HANDSHAKE)
        client->greeted = true;
    else if (count >= 0 || (errno != EAGAIN && errno != ENOTCONN))
        die("a handshake: %s", strerror(errno));
}

static void enter(struct pairing *pairing, struct client *client)
{
    struct sockaddr_in relay = loopback(pairing->options->port, INADDR_LOOPBACK);
    client->fd = client_socket(SOCK_NONBLOCK);
    client->greeted = client->answered = false;
    client->got = 0;
    if (connect(client->fd, (struct sockaddr *)&relay, sizeof relay) != 0 && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    greet(client);
    watch(pairing->epoll, client->fd, client->greeted ? EPOLLIN : EPOLLIN | EPOLLOUT, (uintptr_t)client);
}

static void begin_pair(struct pairing *pairing, struct client *client)
{
    char token[TOKEN];
    new_token(token);
    client->started = client->partner->started = now();
    write_handshake(client->handshake, token, 1);
    write_handshake(client->partner->handshake, token, 2);
    enter(pairing, client);
    enter(pairing, client->partner);
    pairing->begun++;
}

static bool may_begin(const struct pairing *pairing)
{
    if (pairing->options->count)
        return pairing->begun < pairing->options->count;
    return now() < pairing->until;
}

static void finish_pair(struct pairing *pairing, struct client *client)
{
    close(client->fd);
    close(client->partner->fd);
    pairing->finished++;
    if (may_begin(pairing))
        begin_pair(pairing, client);
    else
        client->fd = client->partner->fd = -1;
}

/* What a client says to its partner: digits of the token, and its own side. */
static void write_hello(const struct client *client, char hello[PING])
{
    memcpy(hello, client->handshake + 13, PING - 1);
    hello[PING - 1] = client->handshake[13 + TOKEN + 10];
}

static void answer(struct pairing *pairing, struct client *client)
{
    char hello[PING];
    if (memcmp(client->reply, "ok\n", 3) != 0)
        die("a client got '%.3s' for its handshake", client->reply);
    write_hello(client, hello);
    send_all(client->fd, hello, sizeof hello);
    client->answered = true;
    if (client->partner->answered)
        keep_sample(&pairing->met, now() - client->started);
}

static void read_reply(struct pairing *pairing, struct client *client)
{
    char wanted[PING];
    ssize_t count = recv(client->fd, client->reply + client->got, sizeof client->reply - (size_t)client->got, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0)
        die("a client was let down after %d bytes: %s", client->got, count ? strerror(errno) : "end of stream");
    client->got += (int)count;
    if (!client->answered && client->got >= 3)
        answer(pairing, client);
    if (client->got < (int)sizeof client->reply)
        return;
    write_hello(client->partner, wanted);
    if (memcmp(client->reply + 3, wanted, PING) != 0)
        die("a client got another one's bytes");
    if (client->partner->got == sizeof client->reply)
        finish_pair(pairing, client);
}

static void serve(struct pairing *pairing, struct client *client, uint32_t events)
{
    if (!client->greeted && (events & EPOLLOUT)) {
        struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = (uintptr_t)client}};
        greet(client);
        if (client->greeted)
            must(epoll_ctl(pairing->epoll, EPOLL_CTL_MOD, client->fd, &event) == 0, "epoll_ctl");
    }
    if (events & ~(uint32_t)EPOLLOUT)
        read_reply(pairing, client);
}

/* Serves one batch of events. A pair that begins anew while the batch is served only makes a later event of the batch
 * stale: reading then finds nothing yet. */
static void turn(struct pairing *pairing)
{
    struct epoll_event events[EVENTS];
    int ready = epoll_wait(pairing->epoll, events, EVENTS, STALL_SECONDS * 1000);
    must(ready >= 0 || errno == EINTR, "epoll_wait");
    if (ready == 0)
        die("no pair moved for %d seconds; %ld of %ld finished", STALL_SECONDS, pairing->finished, pairing->begun);
    for (int i = 0; i < ready; i++) {
        struct client *client = (struct client *)(uintptr_t)events[i].data.u64;
        if (client->fd >= 0)
            serve(pairing, client, events[i].events);
    }
}

static void run_pairs(const struct options *options)
{
    struct pairing pairing = {.options = options, .epoll = epoll_create1(EPOLL_CLOEXEC)};
    struct client *clients = calloc((size_t)options->concurrent * 2, sizeof *clients);
    must(clients != NULL, "memory");
    double relay_cpu = cpu_of(options), own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), start = now();
    pairing.until = start + options->seconds;
    for (int i = 0; i < options->concurrent; i++) {
        struct client *client = &clients[i * 2];
        client->partner = client + 1;
        client->partner->partner = client;
        client->fd = client->partner->fd = -1;
        if (may_begin(&pairing))
            begin_pair(&pairing, client);
    }
    while (pairing.finished < pairing.begun)
        turn(&pairing);
    double seconds = now() - start;
    relay_cpu = cpu_of(options) - relay_cpu;
    own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - own_cpu;
    printf("{\"pairs\": %ld, \"seconds\": %.6f, \"relay_cpu\": %.9f, \"own_cpu\": %.9f, ", pairing.finished, seconds,
           relay_cpu, own_cpu);
    print_samples("met", pairing.met.nanoseconds, pairing.met.count);
    puts("}");
}

/* ---- clients that stay ---- */

struct waiter {
    int fd;
    char token[TOKEN];
};

struct crowd {
    int port;
    struct waiter *waiters;
    struct ends *pairs;
    long waiter_count, pair_count;
};

static void *grown(void *array, long count, size_t size)
{
    void *larger = realloc(array, (size_t)count * size);
    must(larger != NULL || count == 0, "memory");
    return larger;
}

static void close_pair(struct ends ends)
{
    close(ends.sender);
    close(ends.receiver);
}

/* The relay accepts in order, so a pair that got its `ok` shows that all who came before it were accepted. Without this
 * its listen queue would overflow, and the clients' retries take seconds. */
static void let_the_relay_catch_up(int port)
{
    close_pair(relayed_pair(port));
}

static void add_waiters(struct crowd *crowd, long count)
{
    crowd->waiters = grown(crowd->waiters, crowd->waiter_count + count, sizeof *crowd->waiters);
    for (long i = 0; i < count; i++) {
        struct waiter *waiter = &crowd->waiters[crowd->waiter_count++];
        new_token(waiter->token);
        waiter->fd = shake_hands(crowd->port, waiter->token, 1);
        if (i % PACE == PACE - 1 || i == count - 1)
            let_the_relay_catch_up(crowd->port);
    }
}

static void add_pairs(struct crowd *crowd, long count)
{
    crowd->pairs = grown(crowd->pairs, crowd->pair_count + count, sizeof *crowd->pairs);
    for (long i = 0; i < count; i++) {
        struct ends ends = relayed_pair(crowd->port);
        round_trip(&ends, (uint64_t)i);
        crowd->pairs[crowd->pair_count++] = ends;
    }
}

static void verify_waiter(struct crowd *crowd)
{
    long chosen = (long)(random_bits() % (uint64_t)crowd->waiter_count);
    struct waiter waiter = crowd->waiters[chosen];
    crowd->waiters[chosen] = crowd->waiters[--crowd->waiter_count];
    struct ends ends = {.sender = waiter.fd, .receiver = shake_hands(crowd->port, waiter.token, 2)};
    expect(ends.sender, "ok\n", 3, "the ok of one who waited");
    expect(ends.receiver, "ok\n", 3, "the ok of a late partner");
    round_trip(&ends, 0);
    close_pair(ends);
}

static void verify(struct crowd *crowd, long count)
{
    for (long i = 0; i < count && crowd->waiter_count; i++)
        verify_waiter(crowd);
    for (long i = 0; i < count && crowd->pair_count; i++)
        round_trip(&crowd->pairs[random_bits() % (uint64_t)crowd->pair_count], (uint64_t)i);
}

static void run_hold(const struct options *options)
{
    struct crowd crowd = {.port = options->port};
    char line[64], word[32];
    while (fgets(line, sizeof line, stdin)) {
        long count = 0;
        if (sscanf(line, "%31s %ld", word, &count) < 1 || strcmp(word, "quit") == 0)
            return;
        if (strcmp(word, "waiters") == 0)
            add_waiters(&crowd, count);
        else if (strcmp(word, "pairs") == 0)
            add_pairs(&crowd, count);
        else if (strcmp(word, "verify") == 0)
            verify(&crowd, count);
        else
            die("what is '%s'?", word);
        printf("{\"waiters\": %ld, \"pairs\": %ld}\n", crowd.waiter_count, crowd.pair_count);
        fflush(stdout);
    }
}

/* ---- the command line ---- */

static void take(struct options *options, const char *name, const char *value)
{
    if (strcmp(name, "--port") == 0)
        options->port = atoi(value);
    else if (strcmp(name, "--listen") == 0)
        options->listen = atoi(value);
    else if (strcmp(name, "--pairs") == 0)
        options->pairs = atoi(value);
    else if (strcmp(name, "--concurrent") == 0)
        options->concurrent = atoi(value);
    else if (strcmp(name, "--count") == 0)
        options->count = atol(value);
    else if (strcmp(name, "--gap-us") == 0)
        options->gap_us = atoi(value);
    else if (strcmp(name, "--seconds") == 0)
        options->seconds = atof(value);
    else if (strcmp(name, "--cpu-of") == 0 && options->cpu_pid_count < MOST_CPU_PIDS)
        options->cpu_pids[options->cpu_pid_count++] = atoi(value);
    else
        die("unknown option, or too many of it: %s", name);
}

int main(int count, char **words)
{
    struct options options = {.concurrent = 16, .seconds = 1};
    if (count < 2)
        die("usage: load traffic|pairs|hold --port P ...");
    for (int i = 2; i < count; i++) {
        if (strcmp(words[i], "--ping") == 0) {
            options.ping = true;
        } else if (strcmp(words[i], "--copy") == 0) {
            options.copy = true;
        } else {
            if (i + 1 == count)
                die("%s wants a value", words[i]);
            take(&options, words[i], words[i + 1]);
            i++;
        }
    }
    if (strcmp(words[1], "traffic") == 0)
        run_traffic(&options);
    else if (strcmp(words[1], "pairs") == 0)
        run_pairs(&options);
    else if (strcmp(words[1], "hold") == 0)
        run_hold(&options);
    else
        die("unknown mode: %s", words[1]);
    return 0;
}
