/* udp_echo ADDRESS PORT: send every datagram back to where it came from, in batches. Runs until it is killed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

enum { BATCH = 64, SIZE = 2048, BUFFER = 4 << 20 };

int main(int argc, char **argv)
{
    static char data[BATCH][SIZE];
    static struct sockaddr_in peers[BATCH];
    static struct iovec parts[BATCH];
    static struct mmsghdr messages[BATCH];
    struct sockaddr_in own = {.sin_family = AF_INET};
    int buffer = BUFFER, fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (argc != 3 || inet_pton(AF_INET, argv[1], &own.sin_addr) != 1)
        errx(2, "usage: udp_echo ADDRESS PORT");
    own.sin_port = htons(atoi(argv[2]));
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer) ||
        bind(fd, (struct sockaddr *)&own, sizeof own))
        err(1, "%s", argv[1]);
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            parts[i] = (struct iovec){data[i], SIZE};
            messages[i].msg_hdr = (struct msghdr){.msg_name = &peers[i], .msg_namelen = sizeof peers[i],
                                                  .msg_iov = &parts[i], .msg_iovlen = 1};
        }
        int got = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
        if (got < 0)
            continue; /* an ICMP error of someone who left */
        for (int i = 0; i < got; i++)
            parts[i].iov_len = messages[i].msg_len;
        for (int sent = 0, more; sent < got; sent += more > 0 ? more : 1)
            more = sendmmsg(fd, messages + sent, got - sent, 0);
    }
}
