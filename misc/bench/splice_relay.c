/* splice_relay: the least that can be called a relay. It shows what the kernel gives, and is the limit to measure with.
 *
 *   splice_relay PORT [BYTES_A_TURN]
 *
 * One process, one epoll loop. Two clients whose handshakes carry the same token get `ok` and are glued: bytes go
 * socket -> pipe -> socket by splice. There is nothing else: no sides, no spares, no refusals, no time-outs, no usage records. A client that
 * does anything unexpected is dropped.
 */
#define _GNU_SOURCE

#include <fcntl.h>
#include <stddef.h>

enum { PIPE = 1 << 20 };

/* What it sent and its partner has not taken yet. */
struct own {
    int pipe[2];
    size_t in_pipe;
};

#include "c_relay.h"

static size_t a_turn = PIPE;

static void open_pipe(struct client *client)
{
    must(pipe2(client->own.pipe, O_NONBLOCK | O_CLOEXEC) == 0, "pipe");
    (void)fcntl(client->own.pipe[1], F_SETPIPE_SZ, PIPE); /* more than this user may have: then it is a small one */
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
        wait_for_partner(client);
    }
}

static bool fill(struct client *from)
{
    ssize_t count = splice(from->fd, NULL, from->own.pipe[1], NULL, a_turn, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (count < 0)
        return errno == EAGAIN;
    from->own.in_pipe += (size_t)count;
    from->ended = count == 0;
    return true;
}

static bool drain(struct client *from)
{
    ssize_t count = splice(from->own.pipe[0], NULL, from->partner->fd, NULL, from->own.in_pipe, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (count < 0)
        return errno == EAGAIN;
    from->own.in_pipe -= (size_t)count;
    return true;
}

static bool pump(struct client *from)
{
    if (!from->ended && from->own.in_pipe == 0 && !fill(from))
        return false;
    if (from->own.in_pipe > 0 && !drain(from))
        return false;
    if (from->ended && from->own.in_pipe == 0 && !from->done) {
        from->done = true;
        shutdown(from->partner->fd, SHUT_WR);
    }
    return true;
}

/* Reads while its pipe is empty, writes while its partner's pipe is not. */
static uint32_t possible(const struct client *client)
{
    uint32_t interest = !client->ended && client->own.in_pipe == 0 ? EPOLLIN : 0;
    return client->partner->own.in_pipe > 0 ? interest | EPOLLOUT : interest;
}

static void let_go(struct client *client)
{
    if (client->partner) {
        close(client->own.pipe[0]);
        close(client->own.pipe[1]);
    }
}

int main(int count, char **words)
{
    if (count < 2) {
        fputs("usage: splice_relay PORT [BYTES_A_TURN]\n", stderr);
        return 2;
    }
    if (count > 2)
        a_turn = (size_t)atol(words[2]);
    run(atoi(words[1]));
}
