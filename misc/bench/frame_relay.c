/* frame_relay: the least that can be called a relay for WebSocket clients. It is the limit to measure with where bytes
 * have to be looked at, as splice_relay is where they need not be.
 *
 *   frame_relay PORT
 *
 * One process, one epoll loop, one port: who begins with `G` speaks WebSocket, all others speak plainly. Two clients
 * whose handshakes carry the same token get `ok` and are glued: recv, take the mask off, send, with headers in between
 * where the receiver wants messages of at most 32 KiB. The answer to each opening handshake is the one of RFC 6455's example, 1.3, since the
 * load program's key is that example's. There are no pings, no checks of frames, and otherwise what splice_relay has not.
 */
#define _GNU_SOURCE

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    TURN = 1 << 20,
    MESSAGE = 32768,
    MOST_HEADERS = TURN / MESSAGE + 1,
    LONGEST_HEADER = 14,
};

static const char ACCEPTED[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/* Where in a client's frames we are: within a payload, or within a header. */
struct place {
    uint64_t left;
    uint8_t mask[4];            /* its first byte is that of the next byte of payload */
    uint8_t header[LONGEST_HEADER];
    size_t in_header;
    bool closed;
};

/* `rest` is what its partner sent and it has not taken yet. */
struct own {
    bool web, asked;            /* speaks WebSocket; and its request has been read in part, but not to the end */
    struct place place;
    char *rest;
    size_t rest_at, rest_size;
    uint32_t last_four;         /* bytes of its request */
};

#include "c_relay.h"

static char received[TURN], unmasked[TURN];

/* ---- frames ---- */

static size_t header_size(uint8_t second)
{
    uint8_t length = second & 127;
    return 6u + (length == 126 ? 2 : length == 127 ? 8 : 0);
}

/* The header is whole: what it says. */
static void enter_frame(struct place *place)
{
    uint8_t length = place->header[1] & 127;
    size_t bytes = length == 126 ? 2 : length == 127 ? 8 : 0;
    place->closed = (place->header[0] & 15) == 8;
    place->left = bytes ? 0 : length;
    for (size_t i = 0; i < bytes; i++)
        place->left = place->left << 8 | place->header[2 + i];
    memcpy(place->mask, place->header + 2 + bytes, 4);
    place->in_header = 0;
}

/* Takes the mask off so much of a payload. */
static void unmask(struct place *place, const char *in, char *out, size_t size)
{
    uint64_t mask, word;
    memcpy(&mask, place->mask, 4);
    memcpy((char *)&mask + 4, place->mask, 4);
    size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        memcpy(&word, in + i, 8);
        word ^= mask;
        memcpy(out + i, &word, 8);
    }
    for (; i < size; i++)
        out[i] = in[i] ^ (char)place->mask[i & 3];
    uint8_t turned[4];
    for (size_t k = 0; k < 4; k++)
        turned[k] = place->mask[(size + k) & 3];
    memcpy(place->mask, turned, 4);
    place->left -= size;
}

/* Payload of what came in; returns how much. Stops at a Close. */
static size_t payload_of(struct place *place, const char *in, size_t size, char *out)
{
    size_t at = 0, made = 0;
    while (at < size && !place->closed) {
        if (place->left) {
            size_t part = place->left < size - at ? (size_t)place->left : size - at;
            unmask(place, in + at, out + made, part);
            at += part;
            made += part;
            continue;
        }
        size_t wanted = place->in_header < 2 ? 2 : header_size(place->header[1]);
        size_t part = wanted - place->in_header < size - at ? wanted - place->in_header : size - at;
        memcpy(place->header + place->in_header, in + at, part);
        place->in_header += part;
        at += part;
        if (place->in_header >= 2 && place->in_header == header_size(place->header[1]))
            enter_frame(place);
    }
    return made;
}

static size_t write_header(char *header, size_t length)
{
    header[0] = (char)0x82;
    if (length < 126) {
        header[1] = (char)length;
        return 2;
    }
    header[1] = 126;
    header[2] = (char)(length >> 8);
    header[3] = (char)length;
    return 4;
}

/* ---- sending ---- */

static void keep_rest(struct client *client, const struct iovec *parts, int count, size_t taken)
{
    if (!client->own.rest)
        must((client->own.rest = malloc(TURN + 4 * MOST_HEADERS)) != NULL, "memory");
    client->own.rest_at = client->own.rest_size = 0;
    for (int i = 0; i < count; i++) {
        if (taken >= parts[i].iov_len) {
            taken -= parts[i].iov_len;
            continue;
        }
        memcpy(client->own.rest + client->own.rest_size, (char *)parts[i].iov_base + taken, parts[i].iov_len - taken);
        client->own.rest_size += parts[i].iov_len - taken;
        taken = 0;
    }
}

/* Sends, as messages where that is what the client wants; what it does not take rests. */
static bool say(struct client *client, char *bytes, size_t size)
{
    static char headers[MOST_HEADERS][4];
    struct iovec parts[2 * MOST_HEADERS] = {{.iov_base = bytes, .iov_len = size}};
    int count = 1;
    size_t wire = size;
    if (client->own.web) {
        count = 0;
        for (size_t at = 0; at < size; at += MESSAGE) {
            size_t length = size - at < MESSAGE ? size - at : MESSAGE;
            char *header = headers[count / 2];
            parts[count++] = (struct iovec){.iov_base = header, .iov_len = write_header(header, length)};
            wire += parts[count - 1].iov_len;
            parts[count++] = (struct iovec){.iov_base = bytes + at, .iov_len = length};
        }
    }
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    ssize_t taken = sendmsg(client->fd, &message, MSG_NOSIGNAL);
    if (taken < 0 && errno != EAGAIN)
        return false;
    taken = taken < 0 ? 0 : taken;
    if ((size_t)taken < wire)
        keep_rest(client, parts, count, (size_t)taken);
    return true;
}

static bool say_rest(struct client *client)
{
    ssize_t taken = send(client->fd, client->own.rest + client->own.rest_at, client->own.rest_size, MSG_NOSIGNAL);
    if (taken < 0)
        return errno == EAGAIN;
    client->own.rest_at += (size_t)taken;
    client->own.rest_size -= (size_t)taken;
    return true;
}

/* ---- pairs ---- */

static void meet(struct client *client)
{
    static char ok[] = "ok\n";
    struct client *partner = matching(client);
    if (!partner) {
        wait_for_partner(client);
        return;
    }
    leave_waiting(partner);
    client->partner = partner;
    partner->partner = client;
    if (!say(client, ok, 3) || !say(partner, ok, 3))
        bury_pair(client);
}

/* The request of one who begins with `G`: nothing of it matters but its end. */
static void read_request(struct client *client, size_t size)
{
    client->own.web = true;
    client->own.asked = true;
    for (size_t i = 0; i < size && client->own.asked; i++) {
        client->own.last_four = client->own.last_four << 8 | (uint8_t)received[i];
        client->own.asked = client->own.last_four != 0x0d0a0d0a;
    }
    if (!client->own.asked && send(client->fd, ACCEPTED, sizeof ACCEPTED - 1, MSG_NOSIGNAL) != sizeof ACCEPTED - 1)
        bury(client);
}

static void shake_hands(struct client *client)
{
    ssize_t count = recv(client->fd, received, 4096, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0 || client->got == LONGEST_HANDSHAKE) {
        leave_waiting(client);
        bury(client);
        return;
    }
    if (client->own.asked || (!client->own.web && client->got == 0 && received[0] == 'G')) {
        read_request(client, (size_t)count);
        return;
    }
    const char *words = received;
    size_t size = (size_t)count, room = LONGEST_HANDSHAKE - client->got;
    if (client->own.web) {
        size = payload_of(&client->own.place, received, size, unmasked);
        words = unmasked;
    }
    size = size < room ? size : room;
    memcpy(client->handshake + client->got, words, size);
    client->got += size;
    if (client->got == LONGEST_HANDSHAKE)
        meet(client);
}

static bool read_some(struct client *from)
{
    ssize_t count = recv(from->fd, received, TURN, 0);
    if (count < 0)
        return errno == EAGAIN;
    from->ended = count == 0;
    if (!from->own.web)
        return count == 0 || say(from->partner, received, (size_t)count);
    size_t size = payload_of(&from->own.place, received, (size_t)count, unmasked);
    from->ended |= from->own.place.closed;
    return size == 0 || say(from->partner, unmasked, size);
}

static bool pump(struct client *from)
{
    struct client *to = from->partner;
    if (to->own.rest_size > 0 && !say_rest(to))
        return false;
    if (!from->ended && to->own.rest_size == 0 && !read_some(from))
        return false;
    if (from->ended && to->own.rest_size == 0 && !from->done) {
        from->done = true;
        if (to->own.web)
            return send(to->fd, "\x88\x02\x03\xe8", 4, MSG_NOSIGNAL) == 4;
        shutdown(to->fd, SHUT_WR);
    }
    return true;
}

/* Reads while its partner takes everything, writes while something rests for it. */
static uint32_t possible(const struct client *client)
{
    uint32_t interest = !client->ended && client->partner->own.rest_size == 0 ? EPOLLIN : 0;
    return client->own.rest_size > 0 ? interest | EPOLLOUT : interest;
}

static void let_go(struct client *client)
{
    free(client->own.rest);
}

int main(int count, char **words)
{
    if (count < 2) {
        fputs("usage: frame_relay PORT\n", stderr);
        return 2;
    }
    run(atoi(words[1]));
}
