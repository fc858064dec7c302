/* Opens files as fast as it can: storm read|write FOLDER FILES LOOPS. Prints the seconds it took.
 * read: open, read, close FOLDER/f0 … ; write: create, write one byte, close. Files follow each other, so that the
 * kernel can't merge the events of one into the next. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int writing = !strcmp(argv[1], "write"), files = atoi(argv[3]), loops = atoi(argv[4]);
    char path[4096], block[4096];
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int loop = 0; loop < loops; loop++)
        for (int file = 0; file < files; file++) {
            snprintf(path, sizeof path, "%s/f%d", argv[2], file);
            int fd = open(path, writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0600);
            if (fd < 0 || (writing ? write(fd, "x", 1) : read(fd, block, sizeof block)) < 0) return 1;
            close(fd);
        }
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("%.6f\n", (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9);
    return 0;
}
