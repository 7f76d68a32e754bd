/* udp_load ADDRESS PORT FLOWS WINDOW SIZE SECONDS: keep WINDOW datagrams of SIZE bytes on their way to an echo
 * server and back on each of FLOWS sockets.
 *
 * A closed loop offers what the path can carry and no more, so the figure is a rate without loss, and a sender does not
 * take the core that the proxy needs. Each datagram has its number in front: a gap is a loss, not a smaller window.
 * Prints JSON: datagrams that came back, lost ones, seconds, and the round trip's p50 and p99 if WINDOW is 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FLOWS_MAX = 256, WINDOW_MAX = 64, SIZE_MAX_BYTES = 2048, TRIPS_MAX = 4 << 20, STALL_NS = 50000000, FIRST_MS = 3000 };

struct flow {
    int fd;
    uint32_t sent, expected; /* the next numbers to send and to come back */
    uint64_t got;
    int64_t last_ns;         /* when it last sent */
};

static struct flow flows[FLOWS_MAX];
static uint32_t trips_ns[TRIPS_MAX];
static char data[WINDOW_MAX][SIZE_MAX_BYTES];
static struct iovec parts[WINDOW_MAX];
static struct mmsghdr messages[WINDOW_MAX];
static size_t trips;
static int window, size;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void refill(struct flow *flow)
{
    int count = window - (int)(flow->sent - flow->expected);

    for (int i = 0; i < count; i++) {
        uint32_t number = flow->sent + i;
        memcpy(data[i], &number, sizeof number);
        parts[i].iov_len = size;
    }
    flow->last_ns = now_ns();
    int sent = sendmmsg(flow->fd, messages, count, MSG_DONTWAIT);
    if (sent > 0)
        flow->sent += sent;
}

static void drain(struct flow *flow)
{
    for (int i = 0; i < WINDOW_MAX; i++)
        parts[i].iov_len = SIZE_MAX_BYTES;
    int count = recvmmsg(flow->fd, messages, WINDOW_MAX, MSG_DONTWAIT, NULL);
    for (int i = 0; i < count; i++) {
        uint32_t number;
        memcpy(&number, data[i], sizeof number);
        if ((int)messages[i].msg_len != size || (int32_t)(number - flow->expected) < 0)
            continue; /* cut, or given up already */
        flow->expected = number + 1;
        flow->got++;
    }
    if (count > 0 && window == 1 && trips < TRIPS_MAX)
        trips_ns[trips++] = now_ns() - flow->last_ns;
}

static int connected(const char *address, int port)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (inet_pton(AF_INET, address, &peer.sin_addr) != 1)
        errx(2, "%s is no IPv4 address", address);
    if (connect(fd, (struct sockaddr *)&peer, sizeof peer))
        err(1, "connect");
    return fd;
}

/* One datagram there and back, so that making the flow is not what is measured. */
static void first_answer(struct flow *flow, int epoll)
{
    struct epoll_event ready;

    flow->sent = flow->expected = 0;
    int wanted = window;
    window = 1;
    refill(flow);
    if (epoll_wait(epoll, &ready, 1, FIRST_MS) == 1)
        drain(flow);
    if (flow->got != 1)
        errx(1, "no answer");
    window = wanted;
    trips = 0;
    flow->got = 0;
}

static int by_size(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
    if (argc != 7)
        errx(2, "usage: udp_load ADDRESS PORT FLOWS WINDOW SIZE SECONDS");
    int count = atoi(argv[3]), epoll = epoll_create1(0);
    window = atoi(argv[4]);
    size = atoi(argv[5]);
    if (count < 1 || count > FLOWS_MAX || window < 1 || window > WINDOW_MAX || size < 4 || size > SIZE_MAX_BYTES)
        errx(2, "FLOWS 1-%d, WINDOW 1-%d, SIZE 4-%d", FLOWS_MAX, WINDOW_MAX, SIZE_MAX_BYTES);
    for (int i = 0; i < WINDOW_MAX; i++) {
        parts[i].iov_base = data[i];
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &flows[i]};
        flows[i].fd = connected(argv[1], atoi(argv[2]));
        epoll_ctl(epoll, EPOLL_CTL_ADD, flows[i].fd, &event);
        first_answer(&flows[i], epoll);
    }

    int64_t start = now_ns(), end = start + (int64_t)(atof(argv[6]) * 1e9), now;
    uint64_t got = 0, sent = 0;
    for (int i = 0; i < count; i++)
        refill(&flows[i]);
    for (int64_t checked = start; (now = now_ns()) < end;) {
        struct epoll_event ready[FLOWS_MAX];
        int number = epoll_wait(epoll, ready, FLOWS_MAX, STALL_NS / 1000000);
        for (int i = 0; i < number; i++) {
            drain(ready[i].data.ptr);
            refill(ready[i].data.ptr);
        }
        for (int i = 0; now - checked > STALL_NS && i < count; i++)
            if (now - flows[i].last_ns > STALL_NS) {
                flows[i].expected = flows[i].sent; /* the whole window is lost */
                refill(&flows[i]);
            }
        if (now - checked > STALL_NS)
            checked = now;
    }
    for (int i = 0; i < count; i++) {
        got += flows[i].got;
        sent += flows[i].expected - 1; /* what is still on its way is neither; the first answer does not count */
    }
    qsort(trips_ns, trips, sizeof *trips_ns, by_size);
    printf("{\"datagrams\": %llu, \"lost\": %llu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f}\n",
           (unsigned long long)got, (unsigned long long)(sent - got), (now - start) / 1e9,
           trips ? trips_ns[trips / 2] / 1e3 : 0, trips ? trips_ns[trips * 99 / 100] / 1e3 : 0);
    return 0;
}
