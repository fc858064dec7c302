/* carry.c - carries a file out in the ways that ordinary programs do not, for the matrix of ways out.
 *
 *   carry login UID [root] COMMAND...   run COMMAND as somebody who logged in as UID (root: with root's rights, as after sudo)
 *   carry MODE SOURCE TARGET            copy SOURCE to TARGET; MODE is one of
 *     mmap mmap-both sendfile splice copy-file-range direct io-uring io-uring-sqpoll
 *     scm        a process opens SOURCE, another one gets the descriptor over a socket and copies
 *     opened     open SOURCE, say "ready", wait for a line on stdin, copy
 *     both-opened  the same, with TARGET open as well
 *     late       read SOURCE into memory, close it, write TARGET three seconds later
 *     unlinked   the copy is made without a name (O_TMPFILE) and linked in afterwards
 *
 * Exit 77: this kernel or file system can't do that; stderr says what is missing. No library but libc.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CANNOT = 77, PIECE = 65536 };

static void put(int out, const char *data, size_t size) {
    while (size > 0) {
        ssize_t done = write(out, data, size);
        if (done < 0) err(1, "write");
        data += done;
        size -= (size_t)done;
    }
}

static void read_write(int in, int out) {
    static char piece[PIECE];
    ssize_t got;
    while ((got = read(in, piece, sizeof piece)) > 0) put(out, piece, (size_t)got);
    if (got < 0) err(1, "read");
}

static int target(const char *path, int more) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | more, 0600);
    if (fd < 0) err(errno == EINVAL ? CANNOT : 1, "%s", path);
    return fd;
}

/* -- io_uring by its three system calls: submit one request, wait for its end ------------------------------------- */

struct ring {
    int fd;
    unsigned *sq_head, *sq_tail, *sq_mask, *sq_flags, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

static struct ring ring_open(unsigned flags) {
    struct io_uring_params p = {.flags = flags, .sq_thread_idle = 1000};
    struct ring r;
    r.fd = (int)syscall(__NR_io_uring_setup, 8, &p);
    if (r.fd < 0) err(CANNOT, "io_uring_setup");
    char *sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                    r.fd, IORING_OFF_SQ_RING);
    char *cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_POPULATE, r.fd, IORING_OFF_CQ_RING);
    r.sqes = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r.fd,
                  IORING_OFF_SQES);
    if (sq == MAP_FAILED || cq == MAP_FAILED || r.sqes == MAP_FAILED) err(1, "mmap of the ring");
    r.sq_head = (unsigned *)(sq + p.sq_off.head), r.sq_tail = (unsigned *)(sq + p.sq_off.tail);
    r.sq_mask = (unsigned *)(sq + p.sq_off.ring_mask), r.sq_flags = (unsigned *)(sq + p.sq_off.flags);
    r.sq_array = (unsigned *)(sq + p.sq_off.array);
    r.cq_head = (unsigned *)(cq + p.cq_off.head), r.cq_tail = (unsigned *)(cq + p.cq_off.tail);
    r.cq_mask = (unsigned *)(cq + p.cq_off.ring_mask), r.cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
    return r;
}

static int ring_do(struct ring *r, unsigned char opcode, int fd, void *data, unsigned size, off_t at) {
    unsigned tail = *r->sq_tail, slot = tail & *r->sq_mask, enter = IORING_ENTER_GETEVENTS;
    r->sqes[slot] = (struct io_uring_sqe){
        .opcode = opcode, .fd = fd, .addr = (uint64_t)(uintptr_t)data, .len = size, .off = (uint64_t)at};
    r->sq_array[slot] = slot;
    __atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(r->sq_flags, __ATOMIC_SEQ_CST) & IORING_SQ_NEED_WAKEUP) enter |= IORING_ENTER_SQ_WAKEUP;
    if (syscall(__NR_io_uring_enter, r->fd, 1, 1, enter, NULL, 0) < 0) err(1, "io_uring_enter");
    unsigned head = *r->cq_head;
    while (head == __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE)) usleep(100);
    int done = r->cqes[head & *r->cq_mask].res;
    __atomic_store_n(r->cq_head, head + 1, __ATOMIC_RELEASE);
    return done;
}

static void by_ring(int in, int out, unsigned flags) {
    static char piece[PIECE];
    struct ring ring = ring_open(flags);
    off_t at = 0;
    int got;
    while ((got = ring_do(&ring, IORING_OP_READ, in, piece, sizeof piece, at)) > 0) {
        if (ring_do(&ring, IORING_OP_WRITE, out, piece, (unsigned)got, at) != got) errx(1, "io_uring write");
        at += got;
    }
    if (got < 0) errx(1, "io_uring read: %s", strerror(-got));
}

/* -- the other ways ------------------------------------------------------------------------------------------------ */

static void scm(const char *from, const char *to) {
    int pair[2];
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec io = {&byte, 1};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) err(1, "socketpair");
    if (fork() == 0) { /* it never opens SOURCE itself */
        int fd;
        if (recvmsg(pair[1], &message, 0) < 0) err(1, "recvmsg");
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
        read_write(fd, target(to, 0));
        _exit(0);
    }
    int fd = open(from, O_RDONLY), status;
    if (fd < 0) err(1, "%s", from);
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    if (sendmsg(pair[0], &message, 0) < 0) err(1, "sendmsg");
    close(fd);
    wait(&status);
    exit(WEXITSTATUS(status));
}

static void mapped(int in, int out, size_t size, int both) {
    char *from = mmap(NULL, size, PROT_READ, MAP_PRIVATE, in, 0);
    if (from == MAP_FAILED) err(1, "mmap");
    if (!both) {
        put(out, from, size);
        return;
    }
    if (ftruncate(out, (off_t)size)) err(1, "ftruncate");
    char *to = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, out, 0);
    if (to == MAP_FAILED) err(CANNOT, "mmap of the target");
    memcpy(to, from, size);
    munmap(to, size);
}

static void direct(const char *from, const char *to, size_t size) {
    int in = open(from, O_RDONLY | O_DIRECT);
    if (in < 0) err(CANNOT, "%s: O_DIRECT", from);
    int out = target(to, O_DIRECT);
    char *piece;
    ssize_t got;
    if (posix_memalign((void **)&piece, 4096, PIECE)) errx(1, "memory");
    while ((got = read(in, piece, PIECE)) > 0) put(out, piece, ((size_t)got + 4095) & ~(size_t)4095);
    if (ftruncate(out, (off_t)size)) err(1, "ftruncate");
}

static void unlinked(int in, const char *to) {
    char folder[4096], self[64];
    snprintf(folder, sizeof folder, "%s", to);
    *strrchr(folder, '/') = 0;
    int out = open(folder, O_TMPFILE | O_RDWR, 0600);
    if (out < 0) err(CANNOT, "O_TMPFILE");
    read_write(in, out);
    snprintf(self, sizeof self, "/proc/self/fd/%d", out);
    if (linkat(AT_FDCWD, self, AT_FDCWD, to, AT_SYMLINK_FOLLOW)) err(1, "linkat");
}

static void late(int in, const char *to, size_t size) {
    char *all = malloc(size);
    if (read(in, all, size) != (ssize_t)size) err(1, "read");
    close(in);
    sleep(3);
    put(target(to, 0), all, size);
}

static int login(int count, char **words) {
    const char *uid = words[0];
    int root = count > 1 && !strcmp(words[1], "root"), fd = open("/proc/self/loginuid", O_WRONLY);
    if (fd < 0 || write(fd, uid, strlen(uid)) < 0) err(CANNOT, "the login uid can't be set (audit in the kernel, not set yet)");
    close(fd);
    if (!root) {
        gid_t gid = (gid_t)atoi(uid);
        if (setgroups(1, &gid) || setgid(gid) || setuid((uid_t)atoi(uid))) err(1, "setuid");
    }
    execvp(words[1 + root], words + 1 + root);
    err(1, "%s", words[1 + root]);
}

int main(int argc, char **argv) {
    if (argc > 3 && !strcmp(argv[1], "login")) return login(argc - 2, argv + 2);
    if (argc != 4) errx(2, "usage: carry MODE SOURCE TARGET");
    const char *mode = argv[1], *from = argv[2], *to = argv[3];
    if (!strcmp(mode, "scm")) scm(from, to);
    int in = open(from, O_RDONLY);
    struct stat st;
    if (in < 0 || fstat(in, &st)) err(1, "%s", from);
    size_t size = (size_t)st.st_size;
    ssize_t moved = 0;
    if (!strcmp(mode, "mmap")) mapped(in, target(to, 0), size, 0);
    else if (!strcmp(mode, "mmap-both")) mapped(in, target(to, 0), size, 1);
    else if (!strcmp(mode, "late")) late(in, to, size);
    else if (!strcmp(mode, "unlinked")) unlinked(in, to);
    else if (!strcmp(mode, "direct")) close(in), direct(from, to, size);
    else if (!strcmp(mode, "io-uring")) by_ring(in, target(to, 0), 0);
    else if (!strcmp(mode, "io-uring-sqpoll")) by_ring(in, target(to, 0), IORING_SETUP_SQPOLL);
    else if (!strcmp(mode, "sendfile")) {
        int out = target(to, 0);
        while ((moved = sendfile(out, in, NULL, 1 << 20)) > 0) {}
    } else if (!strcmp(mode, "copy-file-range")) {
        int out = target(to, 0);
        while ((moved = copy_file_range(in, NULL, out, NULL, 1 << 20, 0)) > 0) {}
        if (moved < 0 && errno == EXDEV) err(CANNOT, "copy_file_range between these file systems");
    } else if (!strcmp(mode, "splice")) {
        int out = target(to, 0), p[2];
        if (pipe(p)) err(1, "pipe");
        while ((moved = splice(in, NULL, p[1], NULL, PIECE, 0)) > 0)
            for (ssize_t left = moved, put_on; left > 0; left -= put_on)
                if ((put_on = splice(p[0], NULL, out, NULL, (size_t)left, 0)) <= 0) err(1, "splice");
    } else if (!strcmp(mode, "opened") || !strcmp(mode, "both-opened")) {
        char line[8];
        int out = !strcmp(mode, "both-opened") ? target(to, 0) : -1;
        puts("ready");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin)) errx(1, "nobody said go");
        read_write(in, out < 0 ? target(to, 0) : out);
    } else errx(2, "%s: no such mode", mode);
    if (moved < 0) err(1, "%s", mode);
    return 0;
}
