/* splice_relay: the least that can be called a relay. It shows what the kernel gives, and is the limit to measure with.
 *
 *   splice_relay PORT [BYTES_A_TURN]
 *
 * One process, one epoll loop. Two clients whose handshakes carry the same token get `ok` and are glued: bytes go
 * socket -> pipe -> socket by splice. There is nothing else: no sides, no spares, no refusals, no time-outs, no usage records. A client that
 * does anything unexpected is dropped.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
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
    PIPE = 1 << 20,
};

/* One side of a pair. Its pipe holds what it sent and its partner has not taken yet. */
struct client {
    int fd;
    int pipe[2];
    size_t in_pipe;
    struct client *partner;
    struct client *next;        /* in a bucket, while waiting; among the dead, after */
    bool ended;                 /* its stream came to the end */
    bool done;                  /* and the partner has been told */
    bool dead;
    uint32_t interest;
    size_t got;
    char handshake[LONGEST_HANDSHAKE];
};

static int epoll_fd;
static size_t a_turn = PIPE;
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

/* Reads while its pipe is empty, writes while its partner's pipe is not. */
static void want_what_is_possible(struct client *client)
{
    uint32_t interest = 0;
    if (!client->ended && client->in_pipe == 0)
        interest |= EPOLLIN;
    if (client->partner->in_pipe > 0)
        interest |= EPOLLOUT;
    want(client, interest);
}

static void bury(struct client *client)
{
    if (client->dead)
        return;
    client->dead = true;
    close(client->fd);
    if (client->pipe[0] >= 0) {
        close(client->pipe[0]);
        close(client->pipe[1]);
    }
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

static struct client *matching(struct client *client)
{
    for (struct client *other = *bucket_of(client); other; other = other->next)
        if (memcmp(other->handshake + TOKEN_AT, client->handshake + TOKEN_AT, TOKEN) == 0)
            return other;
    return NULL;
}

static void open_pipe(struct client *client)
{
    must(pipe2(client->pipe, O_NONBLOCK | O_CLOEXEC) == 0, "pipe");
    (void)fcntl(client->pipe[1], F_SETPIPE_SZ, PIPE); /* more than this user may have: then it is a small one */
}

static void glue(struct client *client, struct client *partner)
{
    client->partner = partner;
    partner->partner = client;
    open_pipe(client);
    open_pipe(partner);
    if (send(client->fd, "ok\n", 3, MSG_NOSIGNAL) != 3 || send(partner->fd, "ok\n", 3, MSG_NOSIGNAL) != 3)
        bury_pair(client);
}

static void shake_hands(struct client *client)
{
    ssize_t count = recv(client->fd, client->handshake + client->got, LONGEST_HANDSHAKE - client->got, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0 || client->got == LONGEST_HANDSHAKE) {
        leave_waiting(client);
        bury(client);
        return;
    }
    client->got += (size_t)count;
    if (client->got < LONGEST_HANDSHAKE)
        return;
    struct client *partner = matching(client);
    if (partner) {
        leave_waiting(partner);
        glue(client, partner);
    } else {
        struct client **bucket = bucket_of(client);
        client->next = *bucket;
        *bucket = client;
    }
}

static bool fill(struct client *from)
{
    ssize_t count = splice(from->fd, NULL, from->pipe[1], NULL, a_turn, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (count < 0)
        return errno == EAGAIN;
    from->in_pipe += (size_t)count;
    from->ended = count == 0;
    return true;
}

static bool drain(struct client *from)
{
    ssize_t count = splice(from->pipe[0], NULL, from->partner->fd, NULL, from->in_pipe, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (count < 0)
        return errno == EAGAIN;
    from->in_pipe -= (size_t)count;
    return true;
}

/* One direction, one turn. Returns false when the pair is to be dropped. */
static bool pump(struct client *from)
{
    if (!from->ended && from->in_pipe == 0 && !fill(from))
        return false;
    if (from->in_pipe > 0 && !drain(from))
        return false;
    if (from->ended && from->in_pipe == 0 && !from->done) {
        from->done = true;
        shutdown(from->partner->fd, SHUT_WR);
    }
    return true;
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
    want_what_is_possible(client);
    want_what_is_possible(client->partner);
}

static void welcome(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), yes = 1;
    if (fd < 0)
        return;
    struct client *client = calloc(1, sizeof *client);
    must(client != NULL, "memory");
    client->fd = fd;
    client->pipe[0] = client->pipe[1] = -1;
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

int main(int count, char **words)
{
    if (count < 2) {
        fputs("usage: splice_relay PORT [BYTES_A_TURN]\n", stderr);
        return 2;
    }
    if (count > 2)
        a_turn = (size_t)atol(words[2]);
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_on(atoi(words[1]));
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
