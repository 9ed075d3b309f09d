/* A folder on a failing disk, for LD_PRELOAD. $FAILING_FOLDER names the folder, $FAILING_MODE a file with its state:
 *   full       no file takes more bytes (ENOSPC)
 *   read-only  nothing can be created, changed or removed (EROFS)
 *   slow       every write takes 20 ms
 *   no-locks   files cannot be locked (ENOLCK)
 * Any other content, or no such file: the disk works. The state is read at every call, so a test can change it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is(const char *mode) {
    char now[16] = "";
    const char *path = getenv("FAILING_MODE");
    long fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDONLY) : -1;
    if (fd < 0) return 0;
    long size = syscall(SYS_read, fd, now, sizeof now - 1);
    syscall(SYS_close, fd);
    return size > 0 && strcmp(now, mode) == 0;
}

static int inside(const char *path) {
    const char *folder = getenv("FAILING_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int open_inside(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}

static int refuses_bytes(int fd) {
    if (!open_inside(fd)) return 0;
    if (is("slow")) usleep(20000);
    if (!is("full")) return 0;
    errno = ENOSPC;
    return 1;
}

static int refuses_change(const char *path) {
    if (!inside(path) || !is("read-only")) return 0;
    errno = EROFS;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) { return refuses_bytes(fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return refuses_bytes(fd) ? -1 : REAL(writev)(fd, parts, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return refuses_bytes(fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return refuses_bytes(out) ? -1 : REAL(copy_file_range)(in, from, out, to, size, flags);
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t size) {
    ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
    return refuses_bytes(out) ? -1 : real(out, in, from, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    return refuses_bytes(fd) ? ENOSPC : REAL(posix_fallocate64)(fd, at, size);
}

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        va_list more;                                                               \
        va_start(more, flags);                                                      \
        mode_t mode = va_arg(more, mode_t);                                         \
        va_end(more);                                                               \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TMPFILE) & ~O_DIRECTORY && refuses_change(path)) return -1; \
        return REAL(name)(path, flags, mode);                                       \
    }
OPEN(open)
OPEN(open64)

int mkdir(const char *path, mode_t mode) { return refuses_change(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return refuses_change(to) ? -1 : REAL(rename)(from, to); }
int unlink(const char *path) { return refuses_change(path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return refuses_change(path) ? -1 : REAL(rmdir)(path); }

#define LOCK(name)                                                     \
    int name(int fd, int command, ...) {                               \
        va_list more;                                                  \
        va_start(more, command);                                       \
        void *argument = va_arg(more, void *);                         \
        va_end(more);                                                  \
        if ((command == F_SETLK || command == F_SETLKW) && open_inside(fd) && is("no-locks")) { \
            errno = ENOLCK;                                            \
            return -1;                                                 \
        }                                                              \
        return REAL(name)(fd, command, argument);                      \
    }
LOCK(fcntl)
LOCK(fcntl64)
