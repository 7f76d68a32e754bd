/* udp_flows ADDRESS PORT COUNT AT_A_TIME FIRST_PORT SOURCE...: many short flows as DNS clients make them.
 *
 * Each flow is a socket of its own on a source address and port that no other flow has: one query of 64 bytes, one
 * answer, closed. A flow without an answer within 250 ms is lost. Prints JSON: answered, lost, seconds to the last
 * answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { AT_A_TIME_MAX = 1024, QUERY = 64, TICK_MS = 20, PATIENCE_NS = 250000000 };

struct slot {
    int fd; /* 0: nothing runs here */
    int64_t since_ns;
};

static struct slot slots[AT_A_TIME_MAX];

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static struct sockaddr_in endpoint(const char *address, int port)
{
    struct sockaddr_in made = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &made.sin_addr) != 1)
        errx(2, "%s is no IPv4 address", address);
    return made;
}

static void ask(struct slot *slot, int epoll, const struct sockaddr_in *source, const struct sockaddr_in *server)
{
    static const char query[QUERY];
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = slot};

    slot->fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    if (slot->fd < 0 || bind(slot->fd, (const struct sockaddr *)source, sizeof *source) ||
        connect(slot->fd, (const struct sockaddr *)server, sizeof *server))
        err(1, "port %d", ntohs(source->sin_port));
    epoll_ctl(epoll, EPOLL_CTL_ADD, slot->fd, &event);
    send(slot->fd, query, sizeof query, 0); /* a refusal shows as a flow without an answer */
    slot->since_ns = now_ns();
}

static void end(struct slot *slot)
{
    close(slot->fd);
    slot->fd = 0;
}

int main(int argc, char **argv)
{
    if (argc < 7)
        errx(2, "usage: udp_flows ADDRESS PORT COUNT AT_A_TIME FIRST_PORT SOURCE...");
    struct sockaddr_in server = endpoint(argv[1], atoi(argv[2]));
    long count = atol(argv[3]), begun = 0, answered = 0, lost = 0;
    int at_a_time = atoi(argv[4]), first = atoi(argv[5]), sources = argc - 6, epoll = epoll_create1(0);
    if (at_a_time < 1 || at_a_time > AT_A_TIME_MAX || first + count / sources > 65535)
        errx(2, "AT_A_TIME 1-%d, and a port for each flow", AT_A_TIME_MAX);

    int64_t start = now_ns(), checked = start, last = start;
    while (answered + lost < count) {
        for (int i = 0; i < at_a_time && begun < count && begun - answered - lost < at_a_time; i++)
            if (!slots[i].fd) {
                struct sockaddr_in source = endpoint(argv[6 + begun % sources], first + begun / sources);
                ask(&slots[i], epoll, &source, &server);
                begun++;
            }
        struct epoll_event ready[AT_A_TIME_MAX];
        int number = epoll_wait(epoll, ready, AT_A_TIME_MAX, TICK_MS);
        int64_t now = now_ns();
        for (int i = 0; i < number; i++) {
            char answer[QUERY + 1];
            struct slot *slot = ready[i].data.ptr;
            if (recv(slot->fd, answer, sizeof answer, 0) == QUERY) {
                answered++;
                last = now;
            } else
                lost++; /* an ICMP error */
            end(slot);
        }
        if (now - checked < TICK_MS * INT64_C(1000000))
            continue;
        checked = now;
        for (int i = 0; i < at_a_time; i++)
            if (slots[i].fd && now - slots[i].since_ns > PATIENCE_NS) {
                lost++;
                end(&slots[i]);
            }
    }
    printf("{\"answered\": %ld, \"lost\": %ld, \"seconds\": %.6f}\n", answered, lost, (last - start) / 1e9);
    return 0;
}
