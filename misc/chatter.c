/* chatter: many transfers that have little to say, from one thread, for `misc/siege.py`.
 *
 *   chatter PORT SOURCE PAIRS RATE SIZE SECONDS
 *
 * PAIRS pairs of clients from the address SOURCE meet, and say `ready`. Then they send RATE messages of SIZE bytes a
 * second, all together and one pair after the other, for so many seconds. One pair more does the same, and its partner
 * answers each message: those round trips are timed by a thread of its own, with precedence where that is allowed. What
 * came of it is one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

enum { LONGEST = 1 << 16, MOST_SAMPLES = 1 << 20, PAUSE_US = 5000 };

struct pair {
    int left, right;
};

static struct {
    struct pair pair;
    size_t size;
    double until;
    double *seconds;
    size_t count;
} timed;

static void must(bool held, const char *what)
{
    if (!held) {
        fprintf(stderr, "chatter: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void rest(long microseconds)
{
    struct timespec pause = {.tv_nsec = microseconds * 1000};
    nanosleep(&pause, NULL);
}

static int call(int port, const char *source, const char *token, int side)
{
    char line[160];
    int yes = 1, size = snprintf(line, sizeof line, "please relay %s for side %016d\n", token, side);
    struct sockaddr_in here = {.sin_family = AF_INET}, there = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(fd >= 0, "socket");
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    must(inet_pton(AF_INET, source, &here.sin_addr) == 1, "not an address");
    there.sin_port = htons((uint16_t)port);
    there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(bind(fd, (struct sockaddr *)&here, sizeof here) == 0, "bind");
    must(connect(fd, (struct sockaddr *)&there, sizeof there) == 0, "connect");
    must(send(fd, line, (size_t)size, MSG_NOSIGNAL) == size, "a handshake");
    return fd;
}

static struct pair meet(int port, const char *source)
{
    unsigned char bits[32];
    char token[65], words[3];
    must(getrandom(bits, sizeof bits, 0) == sizeof bits, "getrandom");
    for (int i = 0; i < 32; i++)
        snprintf(token + 2 * i, 3, "%02x", bits[i]);
    struct pair pair = {call(port, source, token, 1), call(port, source, token, 2)};
    for (int i = 0; i < 2; i++)
        must(recv(i ? pair.right : pair.left, words, 3, MSG_WAITALL) == 3 && memcmp(words, "ok\n", 3) == 0, "no ok");
    return pair;
}

static void *time_round_trips(void *unused)
{
    static char message[LONGEST];
    struct sched_param first = {.sched_priority = 1};
    ssize_t size = (ssize_t)timed.size;
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &first);
    while (now() < timed.until && timed.count < MOST_SAMPLES) {
        double began = now();
        must(send(timed.pair.left, message, timed.size, MSG_NOSIGNAL) == size, "a message");
        must(recv(timed.pair.right, message, timed.size, MSG_WAITALL) == size, "its arrival");
        must(send(timed.pair.right, message, timed.size, MSG_NOSIGNAL) == size, "an answer");
        must(recv(timed.pair.left, message, timed.size, MSG_WAITALL) == size, "its arrival");
        timed.seconds[timed.count++] = now() - began;
        rest(PAUSE_US);
    }
    return unused;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile_ms(double share)
{
    size_t rank = (size_t)(share * (double)timed.count);
    return timed.count ? 1000 * timed.seconds[rank < timed.count ? rank : timed.count - 1] : 0;
}

int main(int argc, char **argv)
{
    static char message[LONGEST];
    must(argc == 7, "usage: chatter PORT SOURCE PAIRS RATE SIZE SECONDS");
    int port = atoi(argv[1]), count = atoi(argv[3]);
    double rate = atof(argv[4]), seconds = atof(argv[6]);
    size_t size = (size_t)atoi(argv[5]);
    struct rlimit fds;
    getrlimit(RLIMIT_NOFILE, &fds);
    fds.rlim_cur = fds.rlim_max;
    setrlimit(RLIMIT_NOFILE, &fds);
    must(count > 0 && size > 0 && size <= LONGEST, "a number is wrong");
    struct pair *pairs = calloc((size_t)count, sizeof *pairs);
    timed.seconds = calloc(MOST_SAMPLES, sizeof *timed.seconds);
    must(pairs != NULL && timed.seconds != NULL, "memory");
    for (int i = 0; i < count; i++)
        pairs[i] = meet(port, argv[2]);
    timed.pair = meet(port, argv[2]);
    timed.size = size;
    puts("ready");
    fflush(stdout);
    pthread_t thread;
    double began = now();
    timed.until = began + seconds;
    must(pthread_create(&thread, NULL, time_round_trips, NULL) == 0, "pthread_create");
    long sent = 0, held_up = 0;
    uint64_t received = 0;
    for (int i = 0; now() < timed.until; i = (i + 1) % count) {
        if (sent + held_up >= (long)((now() - began) * rate)) {
            rest(100);
            continue;
        }
        ssize_t went = send(pairs[i].left, message, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        must(went >= 0 || errno == EAGAIN, "a transfer");
        *(went > 0 ? &sent : &held_up) += 1;
        /* What was said half a round ago has come by now. */
        ssize_t came = recv(pairs[(i + count / 2) % count].right, NULL, LONGEST, MSG_DONTWAIT | MSG_TRUNC);
        must(came > 0 || (came < 0 && errno == EAGAIN), "a receiver");
        received += came > 0 ? (uint64_t)came : 0;
    }
    pthread_join(thread, NULL);
    qsort(timed.seconds, timed.count, sizeof *timed.seconds, by_size);
    printf("{\"messages\": %ld, \"held_up\": %ld, \"received\": %llu, \"seconds\": %.3f, \"round_trips\": %zu, "
           "\"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}\n",
           sent, held_up, (unsigned long long)received, now() - began, timed.count, quantile_ms(0.5), quantile_ms(0.99),
           quantile_ms(1.0));
    return 0;
}
