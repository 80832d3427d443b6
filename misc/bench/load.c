/* load: the clients of the benchmark, cheap enough to load a relay from one core.
 *
 *   load traffic --port P [--listen L] [--pairs N] [--copy] [--ping] [--gap-us G] [--seconds S] [--cpu-of PID]...
 *                [--frame BYTES]... [--beside N]
 *   load pairs   --port P [--concurrent C] [--seconds S] [--count N]
 *   load hold    --port P
 *   all of them  [--web W] [--web-sender] [--web-receiver]
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
 * With --web-sender or --web-receiver (or both) that side of each pair speaks WebSocket, at port W; of those who wait, it
 * is the sender. It sends binary messages of --frame bytes of payload, of all of them in turn, or of 64 KiB, and bytes are counted without their headers. A ping is
 * exchanged over TCP, and so are --beside N further bulk pairs, whose bytes are told apart.
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
    MOST_SIZES = 8,             /* of messages */
    USUAL_MESSAGE = 65536,
    LONGEST_MESSAGE = 1 << 20,
    CLIENT_HEADER = 14,         /* bytes of the longest one, its mask included */
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
    int web;                    /* the port for WebSocket */
    bool web_sender, web_receiver;
    int sizes[MOST_SIZES];      /* of the sender's messages */
    int size_count;
    int beside;
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

/* ---- WebSocket ---- */

/* The answer to this key is a constant, in RFC 6455, 1.3: whoever wants to look at it. */
static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                              "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
static const char CLOSE[] = "\x88\x82\0\0\0\0\x03\xe8";

/* A client's frame: its header, and the payload under a mask of its own. Returns bytes. */
static size_t write_frame(char *frame, const char *payload, size_t size)
{
    size_t head = size < 126 ? 2 : size < 65536 ? 4 : 10;
    uint32_t mask = (uint32_t)random_bits();
    frame[0] = (char)0x82;
    frame[1] = (char)(0x80 | (head == 2 ? size : head == 4 ? 126 : 127));
    for (size_t i = 2; i < head; i++)
        frame[i] = (char)(size >> 8 * (head - 1 - i));
    memcpy(frame + head, &mask, 4);
    for (size_t i = 0; i < size; i++)
        frame[head + 4 + i] = payload[i] ^ frame[head + (i & 3)];
    return head + 4 + size;
}

static bool is_whole_answer(const char *head, size_t size)
{
    return size >= 4 && memcmp(head + size - 4, "\r\n\r\n", 4) == 0;
}

static void must_be_upgraded(const char *head)
{
    if (memcmp(head, "HTTP/1.1 101 ", 13) != 0)
        die("no upgrade to WebSocket: %.40s", head);
}

/* A connection that speaks WebSocket now. */
static int connect_web(int port)
{
    char head[1024] = "";
    size_t got = 0;
    int fd = connect_to(port);
    send_all(fd, REQUEST, sizeof REQUEST - 1);
    while (!is_whole_answer(head, got)) {
        ssize_t count = recv(fd, head + got, sizeof head - 1 - got, 0);
        if (count <= 0)
            die("no answer to an opening handshake");
        got += (size_t)count;
    }
    must_be_upgraded(head);
    return fd;
}

/* Few bytes, in a message of their own where this is WebSocket. */
static void tell(int fd, bool web, const char *words, size_t size)
{
    char frame[CLIENT_HEADER + HANDSHAKE];
    if (web)
        send_all(fd, frame, write_frame(frame, words, size));
    else
        send_all(fd, words, size);
}

/* The next words are these, in a message of their own where this is WebSocket; the relay's pings come before them. */
static void must_hear(int fd, bool web, const char *words, size_t size, const char *what)
{
    char header[2] = {(char)0x82, (char)size}, ping[2];
    while (web && recv(fd, ping, 2, MSG_PEEK | MSG_WAITALL) == 2 && memcmp(ping, "\x89", 2) == 0)
        expect(fd, "\x89", 2, "a ping");
    if (web)
        expect(fd, header, 2, what);
    expect(fd, words, size, what);
}

struct ends {
    int sender, receiver;
    bool web_sender, web_receiver;
};

/* Which of two clients speak WebSocket, and where. */
static struct ends ways_of(const struct options *options)
{
    return (struct ends){.web_sender = options->web_sender, .web_receiver = options->web_receiver};
}

static int call(const struct options *options, bool web, const char token[TOKEN], int side)
{
    char line[HANDSHAKE];
    int fd = web ? connect_web(options->web) : connect_to(options->port);
    write_handshake(line, token, side);
    tell(fd, web, line, sizeof line);
    return fd;
}

/* Two clients with a relay between them, both told `ok`. */
static struct ends relayed_pair(const struct options *options, struct ends ways)
{
    char token[TOKEN];
    new_token(token);
    ways.sender = call(options, ways.web_sender, token, 1);
    ways.receiver = call(options, ways.web_receiver, token, 2);
    must_hear(ways.sender, ways.web_sender, "ok\n", 3, "ok");
    must_hear(ways.receiver, ways.web_receiver, "ok\n", 3, "ok");
    return ways;
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

static struct ends new_pair(const struct options *options, int listener, struct ends ways)
{
    return options->listen ? proxied_pair(options->port, listener) : relayed_pair(options, ways);
}

/* ---- traffic ---- */

struct bulk {
    struct ends ends;
    uint64_t sent;              /* bytes on the wire */
    uint64_t received;          /* bytes of payload */
    bool ending;                /* sends what is left of a message, and the Close */
    uint64_t left;              /* of a message that is being received */
    uint8_t header[10];         /* of the next one, `in_header` bytes of it */
    size_t in_header;
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
    tell(ends->sender, ends->web_sender, ping, sizeof ping);
    must_hear(ends->receiver, ends->web_receiver, ping, sizeof ping, "a ping");
    ping[1] = 'o';
    tell(ends->receiver, ends->web_receiver, ping, sizeof ping);
    must_hear(ends->sender, ends->web_sender, ping, sizeof ping, "a pong");
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

/* Where the bytes come from: a file in memory, or memory that has the same in it. Of messages there are many whole ones
 * one after the other, `ends` says where each ends, and `payload` how much of the file up to there is not header. */
struct source {
    int file;
    char *memory;
    off_t size;
    off_t *ends;
    uint64_t *payload;
    size_t count;
};

static void write_file(int fd, const char *bytes, size_t size)
{
    must(write(fd, bytes, size) == (ssize_t)size, "write to memory");
}

static void fill_with_noise(int fd, struct source *source)
{
    char block[4096];
    for (source->size = 0; source->size < MEMORY_FILE; source->size += (off_t)sizeof block) {
        for (size_t i = 0; i < sizeof block; i += 8) {
            uint64_t bits = random_bits();
            memcpy(block + i, &bits, 8);
        }
        write_file(fd, block, sizeof block);
    }
}

static void fill_with_messages(int fd, struct source *source, const struct options *options)
{
    static char payload[LONGEST_MESSAGE], frame[CLIENT_HEADER + LONGEST_MESSAGE];
    uint64_t total = 0;
    for (size_t i = 0; source->size < MEMORY_FILE || i % (size_t)options->size_count; i++) {
        size_t size = (size_t)options->sizes[i % (size_t)options->size_count];
        size_t wire = write_frame(frame, payload, size);
        write_file(fd, frame, wire);
        source->ends = realloc(source->ends, (i + 1) * sizeof *source->ends);
        source->payload = realloc(source->payload, (i + 1) * sizeof *source->payload);
        must(source->ends != NULL && source->payload != NULL, "memory for messages");
        source->size += (off_t)wire;
        total += size;
        source->ends[i] = source->size;
        source->payload[i] = total;
        source->count = i + 1;
    }
}

static struct source source_of(const struct options *options, bool messages)
{
    struct source source = {.file = memfd_create("load", MFD_CLOEXEC)};
    must(source.file >= 0, "memfd_create");
    if (messages)
        fill_with_messages(source.file, &source, options);
    else
        fill_with_noise(source.file, &source);
    if (options->copy) {
        source.memory = mmap(NULL, (size_t)source.size, PROT_READ, MAP_SHARED, source.file, 0);
        must(source.memory != MAP_FAILED, "mmap");
    }
    return source;
}

/* Which message the sender is in, after so many bytes of the file. */
static size_t message_at(const struct source *source, off_t offset)
{
    size_t low = 0, high = source->count - 1;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (source->ends[middle] > offset)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Of what was sent; between two messages. */
static uint64_t payload_sent(const struct bulk *bulk, const struct source *source)
{
    if (!bulk->ends.web_sender)
        return bulk->sent;
    off_t offset = (off_t)(bulk->sent % (uint64_t)source->size);
    size_t message = message_at(source, offset);
    uint64_t rounds = bulk->sent / (uint64_t)source->size;
    return rounds * source->payload[source->count - 1] + (message ? source->payload[message - 1] : 0);
}

/* Sends once; how much is offered ends with the file, and with the message once the stream is to end. */
static void push(struct bulk *bulk, const struct source *source)
{
    off_t offset = (off_t)(bulk->sent % (uint64_t)source->size);
    off_t until = bulk->ending ? source->ends[message_at(source, offset)] : source->size;
    size_t chunk = source->memory ? COPY_CHUNK : SEND_CHUNK;
    size_t size = (size_t)(until - offset) < chunk ? (size_t)(until - offset) : chunk;
    ssize_t count = source->memory ? send(bulk->ends.sender, source->memory + offset, size, MSG_NOSIGNAL)
                                   : sendfile(bulk->ends.sender, source->file, &offset, size);
    if (count > 0)
        bulk->sent += (uint64_t)count;
    else if (errno != EAGAIN)
        die("a sender: %s", strerror(errno));
}

static bool is_between_messages(const struct bulk *bulk, const struct source *source)
{
    off_t offset = (off_t)(bulk->sent % (uint64_t)source->size);
    size_t message = message_at(source, offset);
    return offset == (message ? source->ends[message - 1] : 0);
}

/* What is left of a message, and then the Close. */
static void push_to_the_end(int epoll, struct bulk *bulk, const struct source *source)
{
    if (!is_between_messages(bulk, source))
        push(bulk, source);
    if (is_between_messages(bulk, source) && send(bulk->ends.sender, CLOSE, sizeof CLOSE - 1, MSG_NOSIGNAL) > 0)
        unwatch(epoll, bulk->ends.sender);
}

static void end_stream(int epoll, struct bulk *bulk)
{
    bulk->ending = bulk->ends.web_sender;
    if (bulk->ending)
        return;
    unwatch(epoll, bulk->ends.sender);
    must(shutdown(bulk->ends.sender, SHUT_WR) == 0, "shutdown");
}

/* Counts the payload in a relay's frames. Returns false at a Close. */
static bool count_payload(struct bulk *bulk, const uint8_t *bytes, size_t size)
{
    for (size_t at = 0; at < size;) {
        if (bulk->left) {
            size_t part = bulk->left < size - at ? (size_t)bulk->left : size - at;
            bulk->left -= part;
            bulk->received += part;
            at += part;
            continue;
        }
        bulk->header[bulk->in_header++] = bytes[at++];
        size_t more = bulk->in_header < 2 ? 2 : bulk->header[1] == 126 ? 4 : bulk->header[1] == 127 ? 10 : 2;
        if (bulk->in_header < more)
            continue;
        if ((bulk->header[0] & 15) == 8)
            return false;
        bulk->left = more == 2 ? bulk->header[1] : 0;
        for (size_t i = 2; i < more; i++)
            bulk->left = bulk->left << 8 | bulk->header[i];
        if (bulk->header[0] & 8)
            die("a receiver got a control frame");
        bulk->in_header = 0;
    }
    return true;
}

/* Returns false at the end of the stream. */
static bool discard(struct bulk *bulk)
{
    static uint8_t bytes[COPY_CHUNK];
    bool web = bulk->ends.web_receiver;
    ssize_t count = recv(bulk->ends.receiver, web ? bytes : NULL, web ? sizeof bytes : DISCARD_CHUNK,
                         (web ? 0 : MSG_TRUNC) | MSG_DONTWAIT);
    if (count < 0 && errno == EAGAIN)
        return true;
    must(count >= 0, "a receiver");
    if (!web) {
        bulk->received += (uint64_t)count;
        return count > 0;
    }
    if (count > 0 && count_payload(bulk, bytes, (size_t)count))
        return true;
    send(bulk->ends.receiver, CLOSE, sizeof CLOSE - 1, MSG_NOSIGNAL);
    return false;
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

/* Sends until the given time, then ends all streams and receives to their ends. `sources`: of bytes, and of messages. */
static void move_bulk(struct bulk *bulks, int count, const struct source sources[2], double until)
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
                push(bulk, &sources[bulk->ends.web_sender]);
            } else if (bulk->ending) {
                push_to_the_end(epoll, bulk, &sources[true]);
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

static uint64_t checked_bytes(const struct bulk *bulks, int count, const struct source sources[2])
{
    uint64_t total = 0;
    for (int i = 0; i < count; i++) {
        uint64_t sent = payload_sent(&bulks[i], &sources[bulks[i].ends.web_sender]);
        if (sent != bulks[i].received)
            die("pair %d: %llu bytes sent, %llu received", i, (unsigned long long)sent,
                (unsigned long long)bulks[i].received);
        total += bulks[i].received;
    }
    return total;
}

/* The pairs that move much, and those beside them. */
static struct bulk *new_bulks(const struct options *options, int listener)
{
    struct bulk *bulks = calloc((size_t)(options->pairs + options->beside) + 1, sizeof *bulks);
    must(bulks != NULL, "memory");
    for (int i = 0; i < options->pairs + options->beside; i++)
        bulks[i].ends = new_pair(options, listener, i < options->pairs ? ways_of(options) : (struct ends){.sender = -1});
    return bulks;
}

static void run_traffic(const struct options *options)
{
    int listener = options->listen ? listen_on(options->listen) : -1, count = options->pairs + options->beside;
    struct bulk *bulks = new_bulks(options, listener);
    struct pinger pinger = {.gap_us = options->gap_us};
    pthread_t thread;
    if (options->ping) {
        pinger.ends = new_pair(options, listener, (struct ends){.sender = -1});
        nodelay(pinger.ends.sender);
        nodelay(pinger.ends.receiver);
    }
    struct source sources[2] = {source_of(options, false), source_of(options, true)};
    double relay_cpu = cpu_of(options), own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), start = now();
    pinger.from = start + WARM_UP;
    pinger.until = start + options->seconds;
    if (options->ping)
        must(pthread_create(&thread, NULL, keep_pinging, &pinger) == 0, "pthread_create");
    move_bulk(bulks, count, sources, start + options->seconds);
    double bulk_seconds = now() - start;
    if (options->ping)
        pthread_join(thread, NULL);
    relay_cpu = cpu_of(options) - relay_cpu;
    own_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - own_cpu;
    printf("{\"bytes\": %llu, \"beside\": %llu, \"seconds\": %.6f, \"relay_cpu\": %.9f, \"own_cpu\": %.9f",
           (unsigned long long)checked_bytes(bulks, options->pairs, sources),
           (unsigned long long)checked_bytes(bulks + options->pairs, options->beside, sources), bulk_seconds, relay_cpu,
           own_cpu);
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
    bool web;
    bool upgraded;              /* or plain */
    char wire[512];             /* of the answer to an upgrade, and of a relay's frame, what has come */
    size_t in_wire;
    bool greeted;               /* our handshake, or our request for an upgrade, is sent */
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
    const char *words = client->web ? REQUEST : client->handshake;
    size_t size = client->web ? sizeof REQUEST - 1 : HANDSHAKE;
    ssize_t count = send(client->fd, words, size, MSG_NOSIGNAL);
    if (count == (ssize_t)size)
        client->greeted = true;
    else if (count >= 0 || (errno != EAGAIN && errno != ENOTCONN))
        die("a handshake: %s", strerror(errno));
}

static void enter(struct pairing *pairing, struct client *client)
{
    const struct options *options = pairing->options;
    struct sockaddr_in relay = loopback(client->web ? options->web : options->port, INADDR_LOOPBACK);
    client->fd = client_socket(SOCK_NONBLOCK);
    client->greeted = client->answered = false;
    client->upgraded = !client->web;
    client->got = 0;
    client->in_wire = 0;
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

static void leave(struct client *client)
{
    if (client->web)
        send(client->fd, CLOSE, sizeof CLOSE - 1, MSG_NOSIGNAL);
    close(client->fd);
}

static void finish_pair(struct pairing *pairing, struct client *client)
{
    leave(client);
    leave(client->partner);
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
    tell(client->fd, client->web, hello, sizeof hello);
    client->answered = true;
    if (client->partner->answered)
        keep_sample(&pairing->met, now() - client->started);
}

/* What of the relay's frames has come is taken out of them, as far as they are whole. */
static int take_payload(struct client *client)
{
    int taken = 0;
    while (client->in_wire >= 2) {
        size_t size = (uint8_t)client->wire[1], room = sizeof client->reply - (size_t)client->got;
        if (client->wire[0] != (char)0x82 || size > room)
            die("a client got a frame that nobody sent");
        if (client->in_wire < 2 + size)
            break;
        memcpy(client->reply + client->got, client->wire + 2, size);
        client->got += (int)size;
        taken += (int)size;
        client->in_wire -= 2 + size;
        memmove(client->wire, client->wire + 2 + size, client->in_wire);
    }
    return taken;
}

/* Returns whether there is more of the reply than before. */
static bool receive(struct client *client)
{
    size_t room = sizeof client->reply - (size_t)client->got;
    ssize_t count = client->web ? recv(client->fd, client->wire + client->in_wire, sizeof client->wire - client->in_wire, 0)
                                : recv(client->fd, client->reply + client->got, room, 0);
    if (count < 0 && errno == EAGAIN)
        return false;
    if (count <= 0)
        die("a client was let down after %d bytes: %s", client->got, count ? strerror(errno) : "end of stream");
    if (!client->web) {
        client->got += (int)count;
        return true;
    }
    client->in_wire += (size_t)count;
    if (client->upgraded)
        return take_payload(client) > 0;
    if (is_whole_answer(client->wire, client->in_wire)) {
        must_be_upgraded(client->wire);
        client->upgraded = true;
        client->in_wire = 0;
        tell(client->fd, true, client->handshake, HANDSHAKE);
    }
    return false;
}

static void read_reply(struct pairing *pairing, struct client *client)
{
    char wanted[PING];
    if (!receive(client))
        return;
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
        client->web = options->web_sender;
        client->partner->web = options->web_receiver;
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
    const struct options *options;
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
static void let_the_relay_catch_up(const struct options *options)
{
    close_pair(relayed_pair(options, ways_of(options)));
}

static void add_waiters(struct crowd *crowd, long count)
{
    crowd->waiters = grown(crowd->waiters, crowd->waiter_count + count, sizeof *crowd->waiters);
    for (long i = 0; i < count; i++) {
        struct waiter *waiter = &crowd->waiters[crowd->waiter_count++];
        new_token(waiter->token);
        waiter->fd = call(crowd->options, crowd->options->web_sender, waiter->token, 1);
        if (i % PACE == PACE - 1 || i == count - 1)
            let_the_relay_catch_up(crowd->options);
    }
}

static void add_pairs(struct crowd *crowd, long count)
{
    crowd->pairs = grown(crowd->pairs, crowd->pair_count + count, sizeof *crowd->pairs);
    for (long i = 0; i < count; i++) {
        struct ends ends = relayed_pair(crowd->options, ways_of(crowd->options));
        round_trip(&ends, (uint64_t)i);
        crowd->pairs[crowd->pair_count++] = ends;
    }
}

static void verify_waiter(struct crowd *crowd)
{
    long chosen = (long)(random_bits() % (uint64_t)crowd->waiter_count);
    struct waiter waiter = crowd->waiters[chosen];
    crowd->waiters[chosen] = crowd->waiters[--crowd->waiter_count];
    struct ends ends = ways_of(crowd->options);
    ends.sender = waiter.fd;
    ends.receiver = call(crowd->options, ends.web_receiver, waiter.token, 2);
    must_hear(ends.sender, ends.web_sender, "ok\n", 3, "the ok of one who waited");
    must_hear(ends.receiver, ends.web_receiver, "ok\n", 3, "the ok of a late partner");
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
    struct crowd crowd = {.options = options};
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

static int size_of(const char *value)
{
    int size = atoi(value);
    if (size < 1 || size > LONGEST_MESSAGE)
        die("--frame %s: 1 to %d", value, LONGEST_MESSAGE);
    return size;
}

/* Notes an option without a value; false when it has one. */
static bool note(struct options *options, const char *name)
{
    if (strcmp(name, "--ping") == 0)
        options->ping = true;
    else if (strcmp(name, "--copy") == 0)
        options->copy = true;
    else if (strcmp(name, "--web-sender") == 0)
        options->web_sender = true;
    else if (strcmp(name, "--web-receiver") == 0)
        options->web_receiver = true;
    else
        return false;
    return true;
}

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
    else if (strcmp(name, "--web") == 0)
        options->web = atoi(value);
    else if (strcmp(name, "--beside") == 0)
        options->beside = atoi(value);
    else if (strcmp(name, "--frame") == 0 && options->size_count < MOST_SIZES)
        options->sizes[options->size_count++] = size_of(value);
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
        if (note(&options, words[i]))
            continue;
        if (i + 1 == count)
            die("%s wants a value", words[i]);
        take(&options, words[i], words[i + 1]);
        i++;
    }
    if (options.size_count == 0)
        options.sizes[options.size_count++] = USUAL_MESSAGE;
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
