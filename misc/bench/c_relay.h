/* What splice_relay and frame_relay have in common: one process, one epoll loop, two clients whose handshakes carry the same
 * token. Whoever includes this has defined `struct own`, what a client has besides, and says below what the bytes do.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    TOKEN_AT = 13,
    TOKEN = 64,
    LONGEST_HANDSHAKE = 13 + 64 + 10 + 16 + 1,
    BUCKETS = 1 << 14,
    EVENTS = 256,
};

/* One side of a pair. */
struct client {
    int fd;
    struct client *partner;
    struct client *next;        /* in a bucket, while waiting; among the dead, after */
    bool ended;                 /* its stream came to the end */
    bool done;                  /* and the partner has been told */
    bool dead;
    uint32_t interest;
    size_t got;
    char handshake[LONGEST_HANDSHAKE];
    struct own own;
};

static void let_go(struct client *client);              /* is about to be freed */
static void shake_hands(struct client *client);         /* has no partner, and has said something */
static bool pump(struct client *from);                  /* one direction, one turn; false: drop the pair */
static uint32_t possible(const struct client *client);  /* what of a paired one is worth waiting for */

static int epoll_fd;
static struct client *waiting[BUCKETS];
static struct client *dead;     /* freed when the batch of events is over */

static void must(bool held, const char *what)
{
    if (!held) {
        perror(what);
        exit(1);
    }
}

static void want(struct client *client, uint32_t interest)
{
    struct epoll_event event = {.events = interest, .data = {.ptr = client}};
    if (interest == client->interest)
        return;
    client->interest = interest;
    must(epoll_ctl(epoll_fd, EPOLL_CTL_MOD, client->fd, &event) == 0, "epoll_ctl");
}

static void bury(struct client *client)
{
    if (client->dead)
        return;
    client->dead = true;
    close(client->fd);
    let_go(client);
    client->next = dead;
    dead = client;
}

static void bury_pair(struct client *client)
{
    bury(client->partner);
    bury(client);
}

static struct client **bucket_of(const struct client *client)
{
    uint32_t hash = 2166136261u;
    for (int i = 0; i < TOKEN; i++)
        hash = (hash ^ (uint8_t)client->handshake[TOKEN_AT + i]) * 16777619u;
    return &waiting[hash % BUCKETS];
}

static void leave_waiting(struct client *client)
{
    for (struct client **link = bucket_of(client); *link; link = &(*link)->next)
        if (*link == client) {
            *link = client->next;
            return;
        }
}

static void wait_for_partner(struct client *client)
{
    struct client **bucket = bucket_of(client);
    client->next = *bucket;
    *bucket = client;
}

static struct client *matching(struct client *client)
{
    for (struct client *other = *bucket_of(client); other; other = other->next)
        if (memcmp(other->handshake + TOKEN_AT, client->handshake + TOKEN_AT, TOKEN) == 0)
            return other;
    return NULL;
}

static void serve(struct client *client, uint32_t events)
{
    if (client->dead)
        return;
    if (!client->partner) {
        shake_hands(client);
        return;
    }
    bool good = !(events & EPOLLERR);
    if (good && events & (EPOLLIN | EPOLLHUP))
        good = pump(client);
    if (good && events & EPOLLOUT)
        good = pump(client->partner);
    if (!good || (client->done && client->partner->done)) {
        bury_pair(client);
        return;
    }
    want(client, possible(client));
    want(client->partner, possible(client->partner));
}

static void welcome(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), yes = 1;
    if (fd < 0)
        return;
    struct client *client = calloc(1, sizeof *client);
    must(client != NULL, "memory");
    client->fd = fd;
    client->interest = EPOLLIN;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = client}};
    must(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
    shake_hands(client);
}

static void free_the_dead(void)
{
    while (dead) {
        struct client *client = dead;
        dead = client->next;
        free(client);
    }
}

static int listen_on(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(fd >= 0, "socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    must(bind(fd, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    must(listen(fd, 512) == 0, "listen");
    return fd;
}

/* Serve on a port of this machine, for ever. */
static _Noreturn void run(int port)
{
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_on(port);
    struct epoll_event events[EVENTS], accepting = {.events = EPOLLIN, .data = {.ptr = NULL}};
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    must(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &accepting) == 0, "epoll_ctl");
    for (;;) {
        int ready = epoll_wait(epoll_fd, events, EVENTS, -1);
        must(ready >= 0 || errno == EINTR, "epoll_wait");
        for (int i = 0; i < ready; i++) {
            if (events[i].data.ptr)
                serve(events[i].data.ptr, events[i].events);
            else
                welcome(listener);
        }
        free_the_dead();
    }
}
