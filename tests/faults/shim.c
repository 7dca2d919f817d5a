/* Counts what a process does to files under given folders, and at the k-th operation kills it or lets it fail.
 *
 * Preloaded (LD_PRELOAD) into the fork server of `server.py`; a child arms it through `faults_arm`. Every operation is
 * also written to a log with the inode, from which `power.py` knows what a power cut would have taken.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL_ONCE, FAIL_FROM_THEN_ON };
enum { CHANGE = 1, READ = 2, REMOVE = 4 }; /* kinds of operations; REMOVE never lacks room */

typedef struct {
    volatile long done; /* operations so far, of this process and of those forked from it */
    volatile int failing;
} Shared;

static int armed, action, failure, kinds, log_handle = -1;
static long at;
static char folders[4][PATH_MAX];
static int folder_count;
static Shared *shared;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void faults_arm(const char *places, int new_action, long new_at, int new_failure, int new_kinds, const char *log_path) {
    folder_count = 0;
    for (const char *start = places; *start && folder_count < 4;) {
        size_t length = strcspn(start, "\n");
        snprintf(folders[folder_count++], PATH_MAX, "%.*s", (int)length, start);
        start += length + (start[length] == '\n');
    }
    action = new_action, at = new_at, failure = new_failure, kinds = new_kinds;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (*log_path) {
        int handle = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
        log_handle = fcntl(handle, F_DUPFD_CLOEXEC, 900);
        close(handle);
    }
    armed = 1;
}

long faults_done(void) { return shared ? shared->done : 0; }

static int inside(const char *path) {
    for (int number = 0; number < folder_count; number++) {
        size_t length = strlen(folders[number]);
        if (!strncmp(path, folders[number], length) && (path[length] == '/' || !path[length])) return 1;
    }
    return 0;
}

static int of_handle(int handle, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static int of_path(int folder, const char *name, char *path) {
    if (!name) return 0;
    if (*name == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, PATH_MAX - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    }
    return inside(path);
}

static void note(const char *what, unsigned long inode, long size, const char *path) {
    char line[PATH_MAX + 100];
    if (log_handle < 0) return;
    int length = snprintf(line, sizeof line, "%s %lu %ld %s\n", what, inode, size, path);
    syscall(SYS_write, log_handle, line, (size_t)length);
}

static void note_handle(const char *what, int handle, const char *path) {
    struct stat status;
    int before = errno;
    if (log_handle >= 0 && !fstat(handle, &status)) note(what, status.st_ino, status.st_size, path);
    errno = before;
}

/* Whether this operation is the one to be disturbed: 0 no, 1 it fails (errno is set), 2 the process is to be killed. */
static int disturbed(int kind, const char *what, const char *path) {
    if (!(kinds & kind)) return 0;
    long number = __sync_add_and_fetch(&shared->done, 1);
    if (action == COUNT) {
        note("#", (unsigned long)number, 0, what);
        return 0;
    }
    if (action == KILL) return number == at ? (note("killed", number, 0, what), note("at", 0, 0, path), 2) : 0;
    if (number == at) {
        note("failed", number, 0, what), note("at", 0, 0, path);
        shared->failing = action == FAIL_FROM_THEN_ON;
    } else if (!shared->failing) {
        return 0;
    }
    errno = failure;
    return 1;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define ON_HANDLE(kind, handle, result)                            \
    char path[PATH_MAX];                                           \
    int ours = armed && of_handle(handle, path);                   \
    int fate = ours ? disturbed(kind, __func__, path) : 0;         \
    if (fate == 1) return result;

#define ON_PATH(kind, folder, name)                                \
    char path[PATH_MAX];                                           \
    int ours = armed && of_path(folder, name, path);               \
    int fate = ours ? disturbed(kind, __func__, path) : 0;         \
    if (fate == 2) die();                                          \
    if (fate == 1) return -1;

/* Opening. */

static int opened(int folder, const char *name, int flags, mode_t mode, const char *what) {
    char path[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    int ours = armed && of_path(folder, name, path);
    int fate = ours ? disturbed(writes ? CHANGE : READ, what, path) : 0;
    if (fate == 2) die();
    if (fate == 1) return -1;
    int handle = syscall(SYS_openat, folder, name, flags, mode);
    if (ours && writes && handle >= 0) {
        if (flags & O_TRUNC) note_handle("write", handle, path);
        if ((flags & O_TMPFILE) == O_TMPFILE) note_handle("write", handle, path);
    }
    return handle;
}

#define MODE                                                       \
    mode_t mode = 0;                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                           \
        va_list rest;                                              \
        va_start(rest, flags);                                     \
        mode = va_arg(rest, mode_t);                               \
        va_end(rest);                                              \
    }

int open(const char *name, int flags, ...) { MODE return opened(AT_FDCWD, name, flags, mode, "open"); }
int open64(const char *name, int flags, ...) { MODE return opened(AT_FDCWD, name, flags, mode, "open"); }
int openat(int folder, const char *name, int flags, ...) { MODE return opened(folder, name, flags, mode, "open"); }
int openat64(int folder, const char *name, int flags, ...) { MODE return opened(folder, name, flags, mode, "open"); }
int __open_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0, "open"); }
int __open64_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0, "open"); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode, "open"); }

static FILE *fopened(const char *name, const char *mode, const char *symbol) {
    char path[PATH_MAX];
    int writes = strpbrk(mode, "wa+") != NULL;
    int ours = armed && of_path(AT_FDCWD, name, path);
    int fate = ours ? disturbed(writes ? CHANGE : READ, "fopen", path) : 0;
    if (fate == 2) die();
    if (fate == 1) return NULL;
    FILE *stream = ((FILE * (*)(const char *, const char *)) real(symbol))(name, mode);
    if (ours && writes && stream) note_handle("write", fileno(stream), path);
    return stream;
}

FILE *fopen(const char *name, const char *mode) { return fopened(name, mode, "fopen"); }
FILE *fopen64(const char *name, const char *mode) { return fopened(name, mode, "fopen64"); }

/* Writing. A killed write has written half. */

ssize_t write(int handle, const void *bytes, size_t size) {
    ON_HANDLE(CHANGE, handle, -1)
    ssize_t written = syscall(SYS_write, handle, bytes, fate == 2 ? size / 2 : size);
    if (ours) note_handle("write", handle, path);
    if (fate == 2) die();
    return written;
}

static ssize_t pwritten(int handle, const void *bytes, size_t size, off64_t offset) {
    ON_HANDLE(CHANGE, handle, -1)
    ssize_t written = syscall(SYS_pwrite64, handle, bytes, fate == 2 ? size / 2 : size, offset);
    if (ours) note_handle("write", handle, path);
    if (fate == 2) die();
    return written;
}

ssize_t pwrite(int handle, const void *bytes, size_t size, off_t offset) { return pwritten(handle, bytes, size, offset); }
ssize_t pwrite64(int handle, const void *bytes, size_t size, off64_t offset) {
    return pwritten(handle, bytes, size, offset);
}

ssize_t writev(int handle, const struct iovec *parts, int count) {
    ON_HANDLE(CHANGE, handle, -1)
    ssize_t written = syscall(SYS_writev, handle, parts, fate == 2 ? count / 2 : count);
    if (ours) note_handle("write", handle, path);
    if (fate == 2) die();
    return written;
}

size_t fwrite(const void *bytes, size_t size, size_t count, FILE *stream) { /* NumPy's tofile */
    ON_HANDLE(CHANGE, fileno(stream), 0)
    size_t written = REAL(fwrite)(bytes, size, fate == 2 ? count / 2 : count, stream);
    if (ours) fflush(stream), note_handle("write", fileno(stream), path);
    if (fate == 2) die();
    return written;
}

static ssize_t sent(int target, int source, off64_t *offset, size_t size) {
    ON_HANDLE(CHANGE, target, -1)
    ssize_t written = syscall(SYS_sendfile, target, source, offset, fate == 2 && size < 1 << 20 ? size / 2 : size);
    if (ours) note_handle("write", target, path);
    if (fate == 2) die();
    return written;
}

ssize_t sendfile(int target, int source, off_t *offset, size_t size) { return sent(target, source, offset, size); }
ssize_t sendfile64(int target, int source, off64_t *offset, size_t size) { return sent(target, source, offset, size); }

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t size, unsigned flags) {
    ON_HANDLE(CHANGE, target, -1)
    ssize_t written = syscall(SYS_copy_file_range, source, from, target, to, size, flags);
    if (ours) note_handle("write", target, path);
    if (fate == 2) die();
    return written;
}

#define RESIZE(name, type)                                         \
    int name(int handle, type size) {                              \
        ON_HANDLE(CHANGE, handle, -1)                              \
        if (fate == 2) die();                                      \
        int result = syscall(SYS_ftruncate, handle, size);         \
        if (ours) note_handle("write", handle, path);              \
        return result;                                             \
    }
RESIZE(ftruncate, off_t)
RESIZE(ftruncate64, off64_t)

#define RESIZE_PATH(name, type)                                    \
    int name(const char *file, type size) {                        \
        ON_PATH(CHANGE, AT_FDCWD, file)                            \
        return syscall(SYS_truncate, file, size);                  \
    }
RESIZE_PATH(truncate, off_t)
RESIZE_PATH(truncate64, off64_t)

#define RESERVE(name, type)                                        \
    int name(int handle, type start, type size) {                  \
        ON_HANDLE(CHANGE, handle, failure)                         \
        if (fate == 2) die();                                      \
        return syscall(SYS_fallocate, handle, 0, start, size) ? errno : 0; \
    }
RESERVE(posix_fallocate, off_t)
RESERVE(posix_fallocate64, off64_t)

/* Reading. */

ssize_t read(int handle, void *bytes, size_t size) {
    if (armed && kinds & READ) {
        ON_HANDLE(READ, handle, -1)
        if (fate == 2) die();
    }
    return syscall(SYS_read, handle, bytes, size);
}

/* Bringing to the disk. */

static int synced(int handle, int call, const char *what) {
    char path[PATH_MAX];
    int ours = armed && of_handle(handle, path);
    int fate = ours ? disturbed(CHANGE, what, path) : 0;
    if (fate == 2) die();
    if (fate == 1) return -1;
    int result = ours ? 0 : syscall(call, handle); /* no power is cut here: it need not be done, only noted */
    if (ours) note_handle("sync", handle, path);
    return result;
}

int fsync(int handle) { return synced(handle, SYS_fsync, "fsync"); }
int fdatasync(int handle) { return synced(handle, SYS_fdatasync, "fsync"); }

/* Maps that are written to: whatever was not brought to the disk since is lost. */

enum { MAPS = 256 };
static struct {
    char *start;
    size_t size;
    unsigned long inode;
    char path[PATH_MAX];
} maps[MAPS];

static void *mapped(void *wish, size_t size, int protection, int flags, int handle, off64_t offset) {
    void *start = (void *)syscall(SYS_mmap, wish, size, protection, flags, handle, offset);
    char path[PATH_MAX];
    struct stat status;
    if (!armed || start == MAP_FAILED || handle < 0 || !(flags & MAP_SHARED) || !(protection & PROT_WRITE)) return start;
    if (!of_handle(handle, path) || fstat(handle, &status)) return start;
    note("write", status.st_ino, status.st_size, path);
    for (int number = 0; number < MAPS; number++)
        if (!maps[number].start) {
            maps[number].start = start, maps[number].size = size, maps[number].inode = status.st_ino;
            strcpy(maps[number].path, path);
            break;
        }
    return start;
}

void *mmap(void *wish, size_t size, int protection, int flags, int handle, off_t offset) {
    return mapped(wish, size, protection, flags, handle, offset);
}
void *mmap64(void *wish, size_t size, int protection, int flags, int handle, off64_t offset) {
    return mapped(wish, size, protection, flags, handle, offset);
}

int msync(void *start, size_t size, int flags) {
    for (int number = 0; armed && number < MAPS; number++)
        if (maps[number].start && (char *)start >= maps[number].start &&
            (char *)start < maps[number].start + maps[number].size)
            note("sync", maps[number].inode, (long)maps[number].size, maps[number].path);
    return syscall(SYS_msync, start, size, flags);
}

int munmap(void *start, size_t size) {
    for (int number = 0; armed && number < MAPS; number++)
        if (maps[number].start == start) maps[number].start = NULL;
    return syscall(SYS_munmap, start, size);
}

/* Names. */

int rename(const char *from, const char *to) {
    ON_PATH(CHANGE, AT_FDCWD, to)
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    ON_PATH(CHANGE, to_folder, to)
    return syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
}
int link(const char *from, const char *to) {
    ON_PATH(CHANGE, AT_FDCWD, to)
    return syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    ON_PATH(CHANGE, to_folder, to)
    return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
}
int symlink(const char *target, const char *name) {
    ON_PATH(CHANGE, AT_FDCWD, name)
    return syscall(SYS_symlinkat, target, AT_FDCWD, name);
}
int mkdir(const char *name, mode_t mode) {
    ON_PATH(CHANGE, AT_FDCWD, name)
    return syscall(SYS_mkdirat, AT_FDCWD, name, mode);
}
int mkdirat(int folder, const char *name, mode_t mode) {
    ON_PATH(CHANGE, folder, name)
    return syscall(SYS_mkdirat, folder, name, mode);
}
int unlink(const char *name) {
    ON_PATH(REMOVE, AT_FDCWD, name)
    return syscall(SYS_unlinkat, AT_FDCWD, name, 0);
}
int unlinkat(int folder, const char *name, int flags) {
    ON_PATH(REMOVE, folder, name)
    return syscall(SYS_unlinkat, folder, name, flags);
}
int rmdir(const char *name) {
    ON_PATH(REMOVE, AT_FDCWD, name)
    return syscall(SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
}
int utimensat(int folder, const char *name, const struct timespec times[2], int flags) {
    ON_PATH(CHANGE, folder, name)
    return syscall(SYS_utimensat, folder, name, times, flags);
}
