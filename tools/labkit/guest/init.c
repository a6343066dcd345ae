// PID 1 of the lab's guest.
//
// Reads one job from /lab/job, prepares the machine for it, runs the job's program, and reports everything to the host
// over one virtio-serial port. The kernel keeps its console to itself, so program output never mixes with kernel
// messages.
//
//   job file    records "key value", each ended by a NUL byte; the keys are in read_job().
//   to host     frames: one type byte, the payload's length in four bytes (little endian), the payload.
//                 'o' standard output   'e' standard error   'l' a remark of this program
//                 'a' a piece of a newc archive (the files that come back)   'x' the verdict, always last
//   from host   single bytes: 'K' stop the program now, 'B' everything arrived: power off.
//
// The verdict is text: "exit N", "signal N", "stopped" (the host asked, the program died), "stuck" (the host asked, and
// it would not die), or "failed WHY" (this program could not start the job).

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
  list_max = 256,
  frame_max = 32 * 1024,
  unsized_file_max = 64 << 20,  // files of proc, sysfs and debugfs do not tell their size: read whole, up to here
  port_wait_ms = 10000,
  device_wait_ms = 5000,
  goodbye_wait_ms = 10000,
  term_grace_ms = 2000,  // between SIGTERM and SIGKILL
  kill_grace_ms = 5000,  // between SIGKILL and giving up on a program that the kernel will not let die
};

struct list {
  char* item[list_max];
  int count;
};

static struct {
  struct list args, env, modules, bind, bring;
  char* dma_entry_limit;
  char* cwd;
} job;

static int port = -1;

static int64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void sleep_ms(int ms) {
  struct timespec t = {ms / 1000, (ms % 1000) * 1000000L};
  nanosleep(&t, NULL);
}

// ---- the channel to the host

static bool write_all(int fd, const void* data, size_t length) {
  const char* from = data;
  while (length > 0) {
    ssize_t n = write(fd, from, length);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n <= 0) return false;
    from += n;
    length -= (size_t)n;
  }
  return true;
}

static void send_frame(char type, const void* data, size_t length) {
  unsigned char head[5] = {(unsigned char)type, length & 255, length >> 8 & 255, length >> 16 & 255,
                           length >> 24 & 255};
  if (port < 0 || !write_all(port, head, sizeof head) || !write_all(port, data, length)) port = -1;
}

__attribute__((format(printf, 2, 3))) static void send_text(char type, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (port < 0) dprintf(2, "lab init: %s\n", text);
  send_frame(type, text, strlen(text));
}

static _Noreturn void power_off(void) {
  sync();
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

static void await_goodbye(void) {
  int64_t until = now_ms() + goodbye_wait_ms;
  while (port >= 0 && now_ms() < until) {
    struct pollfd p = {port, POLLIN, 0};
    char byte;
    if (poll(&p, 1, 200) == 1 && (read(port, &byte, 1) <= 0 || byte == 'B')) return;
  }
}

__attribute__((format(printf, 1, 2))) static _Noreturn void give_up(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  send_text('x', "failed %s", text);
  await_goodbye();
  power_off();
}

// ---- small file helpers

static bool write_text(const char* path, const char* text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
  close(fd);
  return ok;
}

// A line in the kernel's own log, so that the console shows which messages belong to the program.
static void mark_kernel_log(const char* text) {
  char line[128];
  snprintf(line, sizeof line, "<5>iovane-lab: %s", text);
  write_text("/dev/kmsg", line);
}

// Reads the first line of a small file; empty when there is none.
static void read_line(const char* path, char* line, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? 0 : read(fd, line, size - 1);
  if (fd >= 0) close(fd);
  line[n > 0 ? n : 0] = 0;
  line[strcspn(line, "\n")] = 0;
}

// Reads a whole file of unknown size. The caller frees the result; NULL with errno on failure.
static char* slurp(int fd, size_t limit, size_t* length) {
  size_t room = 64 * 1024, used = 0;
  char* data = malloc(room);
  while (data) {
    if (used == room) {
      if (room >= limit) break;
      char* larger = realloc(data, room *= 2);
      if (!larger) break;
      data = larger;
    }
    ssize_t n = read(fd, data + used, room - used);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && used == 0) {
      free(data);
      return NULL;
    }
    if (n <= 0) break;
    used += (size_t)n;
  }
  *length = used;
  return data;
}

static void append(struct list* list, char* item) {
  if (list->count == list_max - 1) give_up("more than %d entries of one kind in the job", list_max - 1);
  list->item[list->count++] = item;
}

// ---- preparing the machine

static void mount_file_systems(void) {
  static const struct {
    const char *type, *at, *options;
  } wanted[] = {
      {"proc", "/proc", NULL},
      {"sysfs", "/sys", NULL},
      {"devtmpfs", "/dev", NULL},
      {"devpts", "/dev/pts", "ptmxmode=666"},
      {"tmpfs", "/dev/shm", "mode=1777"},
      {"hugetlbfs", "/dev/hugepages", NULL},
      {"debugfs", "/sys/kernel/debug", NULL},
      {"tracefs", "/sys/kernel/tracing", NULL},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
    mkdir(wanted[i].at, 0755);  // most exist; sysfs makes its own mount points
    mount(wanted[i].type, wanted[i].at, wanted[i].type, MS_NOSUID, wanted[i].options);
  }
  // The root is a tmpfs already. Nothing is mounted over these, because the program itself may lie below one of them.
  mkdir("/tmp", 01777);
  mkdir("/run", 0755);
  mkdir("/out", 0755);
  mkdir("/root", 0700);
  symlink("/proc/self/fd", "/dev/fd");
  symlink("/proc/self/fd/0", "/dev/stdin");
  symlink("/proc/self/fd/1", "/dev/stdout");
  symlink("/proc/self/fd/2", "/dev/stderr");
}

static void raise_loopback(void) {
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
  if (fd < 0) return;
  ioctl(fd, SIOCSIFFLAGS, &request);
  close(fd);
}

// Fills `job`. The records stay in memory for the life of this process.
static const char* read_job(void) {
  int fd = open("/lab/job", O_RDONLY | O_CLOEXEC);
  size_t length = 0;
  char* data = fd < 0 ? NULL : slurp(fd, 16 << 20, &length);
  if (!data || length == 0 || data[length - 1] != 0) return "no readable /lab/job in the initramfs";
  close(fd);
  for (char* record = data; record < data + length; record += strlen(record) + 1) {
    char* value = strchr(record, ' ');
    if (!value) return "a record without a value in /lab/job";
    size_t key = (size_t)(value++ - record);
#define KEY(name) (key == strlen(name) && memcmp(record, name, key) == 0)
    if (KEY("arg"))
      append(&job.args, value);
    else if (KEY("env"))
      append(&job.env, value);
    else if (KEY("module"))
      append(&job.modules, value);
    else if (KEY("bind"))
      append(&job.bind, value);
    else if (KEY("bring"))
      append(&job.bring, value);
    else if (KEY("dma_entry_limit"))
      job.dma_entry_limit = value;
    else if (KEY("cwd"))
      job.cwd = value;
    else
      return "an unknown key in /lab/job";
#undef KEY
    record = value;
  }
  return job.args.count > 0 ? NULL : "no program in /lab/job";
}

// Modules come with their dependencies first; a failure is reported once the port is there.
static char* load_modules(void) {
  enum { compressed = 4 };  // MODULE_INIT_COMPRESSED_FILE
  static char failure[256];
  for (int i = 0; i < job.modules.count && !failure[0]; i++) {
    const char* path = job.modules.item[i];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool packed = strstr(path, ".ko.") != NULL;
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", packed ? compressed : 0) != 0 && errno != EEXIST))
      snprintf(failure, sizeof failure, "module %s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
  }
  return failure[0] ? failure : NULL;
}

// The port's device node appears when the driver has probed, which may be after PID 1 has started.
static int open_port(const char* name) {
  for (int64_t until = now_ms() + port_wait_ms; now_ms() < until; sleep_ms(20)) {
    DIR* dir = opendir("/sys/class/virtio-ports");
    struct dirent* entry;
    int fd = -1;
    while (dir && fd < 0 && (entry = readdir(dir))) {
      char path[512], found[64];
      snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
      read_line(path, found, sizeof found);
      if (strcmp(found, name) != 0) continue;
      snprintf(path, sizeof path, "/dev/%s", entry->d_name);
      fd = open(path, O_RDWR | O_CLOEXEC);
    }
    if (dir) closedir(dir);
    if (fd >= 0) return fd;
  }
  return -1;
}

static void append_csv(char* csv, size_t size, const char* item) {
  size_t used = strlen(csv);
  snprintf(csv + used, size - used, "%s%s", used ? "," : "", item);
}

// vfio makes its nodes while it binds, devtmpfs a moment later.
static bool await_path(const char* path) {
  for (int64_t until = now_ms() + device_wait_ms; now_ms() < until; sleep_ms(10))
    if (access(path, F_OK) == 0) return true;
  return false;
}

// The first name in a directory that starts with `prefix`; empty when there is none.
static void find_entry(const char* path, const char* prefix, char* name, size_t size) {
  DIR* dir = opendir(path);
  struct dirent* entry;
  name[0] = 0;
  while (dir && !name[0] && (entry = readdir(dir)))
    if (strncmp(entry->d_name, prefix, strlen(prefix)) == 0) snprintf(name, size, "%s", entry->d_name);
  if (dir) closedir(dir);
}

// Which entry of the job asks for this device; -1 when none does.
static int asked_by(const char* bdf) {
  char path[512], vendor[16], device[16], id[40];
  snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vendor", bdf);
  read_line(path, vendor, sizeof vendor);
  snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/device", bdf);
  read_line(path, device, sizeof device);
  if (strlen(vendor) < 3 || strlen(device) < 3) return -1;
  snprintf(id, sizeof id, "%s:%s", vendor + 2, device + 2);
  for (int i = 0; i < job.bind.count; i++)
    if (strcasecmp(job.bind.item[i], id) == 0 || strcasecmp(job.bind.item[i], bdf) == 0) return i;
  return -1;
}

// Binds the asked-for devices to vfio-pci and tells the program where they are:
//   IOVANE_LAB_DEVICES  PCI addresses   IOVANE_LAB_GROUPS  their /dev/vfio/N   IOVANE_LAB_CDEVS  their
//   /dev/vfio/devices/vfioN
// The three lists run in parallel; "-" stands for a node that this kernel does not offer.
static void bind_devices(void) {
  static char devices[4096] = "IOVANE_LAB_DEVICES=", groups[4096] = "IOVANE_LAB_GROUPS=",
              cdevs[4096] = "IOVANE_LAB_CDEVS=";
  char *device_list = strchr(devices, '=') + 1, *group_list = strchr(groups, '=') + 1,
       *cdev_list = strchr(cdevs, '=') + 1;
  bool found[list_max] = {false};
  struct dirent** entry = NULL;
  int count = job.bind.count ? scandir("/sys/bus/pci/devices", &entry, NULL, alphasort) : 0;
  for (int i = 0; i < count; i++) {
    const char* bdf = entry[i]->d_name;
    int asker = bdf[0] == '.' ? -1 : asked_by(bdf);
    if (asker < 0) continue;
    found[asker] = true;
    char path[512], target[512], name[300];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver/unbind", bdf);
    write_text(path, bdf);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver_override", bdf);
    if (!write_text(path, "vfio-pci") || !write_text("/sys/bus/pci/drivers_probe", bdf))
      give_up("cannot bind %s to vfio-pci: %s", bdf, strerror(errno));
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver", bdf);
    ssize_t n = readlink(path, target, sizeof target - 1);
    target[n > 0 ? n : 0] = 0;
    if (!strstr(target, "vfio-pci")) give_up("vfio-pci did not take %s; is the device behind an IOMMU?", bdf);

    append_csv(device_list, sizeof devices - 32, bdf);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", bdf);
    n = readlink(path, target, sizeof target - 1);
    target[n > 0 ? n : 0] = 0;
    snprintf(path, sizeof path, "/dev/vfio/%s", n > 0 ? strrchr(target, '/') + 1 : "?");
    append_csv(group_list, sizeof groups - 32, n > 0 && await_path(path) ? path : "-");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/vfio-dev", bdf);
    find_entry(path, "vfio", name, sizeof name);
    snprintf(path, sizeof path, "/dev/vfio/devices/%s", name);
    append_csv(cdev_list, sizeof cdevs - 32,
               name[0] && access("/dev/vfio/devices", F_OK) == 0 && await_path(path) ? path : "-");
  }
  for (int i = 0; i < job.bind.count; i++)
    if (!found[i]) give_up("no PCI device %s to bind", job.bind.item[i]);
  append(&job.env, devices);
  append(&job.env, groups);
  append(&job.env, cdevs);
}

static void apply_limits(void) {
  static const char limit[] = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
  if (job.dma_entry_limit && !write_text(limit, job.dma_entry_limit))
    give_up("cannot set %s: %s", limit, strerror(errno));
}

// ---- running the program

struct child {
  pid_t pid;
  int out, err;  // the reading ends of its pipes; -1 after the end
};

static struct child start_program(const sigset_t* mask_before) {
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) give_up("pipe: %s", strerror(errno));
  pid_t pid = fork();
  if (pid < 0) give_up("fork: %s", strerror(errno));
  if (pid == 0) {
    sigprocmask(SIG_SETMASK, mask_before, NULL);
    setsid();
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(out[1], 1);
    dup2(err[1], 2);
    if (null > 2) close(null);
    if (chdir(job.cwd ? job.cwd : "/out")) _exit(126);
    execve(job.args.item[0], job.args.item, job.env.item);
    int why = errno;
    dprintf(2, "lab: cannot run %s: %s\n", job.args.item[0], strerror(why));
    _exit(why == ENOENT ? 127 : 126);
  }
  close(out[1]);
  close(err[1]);
  fcntl(out[0], F_SETFL, O_NONBLOCK);
  fcntl(err[0], F_SETFL, O_NONBLOCK);
  return (struct child){pid, out[0], err[0]};
}

// Passes on what is there now. Closes the pipe at its end.
static void relay(int* fd, char type) {
  char buffer[frame_max];
  ssize_t n;
  while (*fd >= 0 && (n = read(*fd, buffer, sizeof buffer)) != 0) {
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return;
    send_frame(type, buffer, (size_t)n);
  }
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

// Reaps everything that has died; true when the program itself has.
static bool reap(pid_t program, int* status) {
  bool gone = false;
  int one;
  for (pid_t pid; (pid = waitpid(-1, &one, WNOHANG)) > 0;)
    if (pid == program) {
      gone = true;
      *status = one;
    }
  return gone;
}

// Ends what the program left behind, so that its vfio and iommufd descriptors close while the kernel log is still
// watched.
static void sweep_processes(void) {
  kill(-1, SIGKILL);
  for (int64_t until = now_ms() + kill_grace_ms; now_ms() < until; sleep_ms(5))
    if (waitpid(-1, NULL, WNOHANG) < 0) return;
}

static void run_program(char* verdict, size_t size) {
  sigset_t child_signal, mask_before;
  sigemptyset(&child_signal);
  sigaddset(&child_signal, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child_signal, &mask_before);
  int signals = signalfd(-1, &child_signal, SFD_CLOEXEC | SFD_NONBLOCK);

  mark_kernel_log("the program starts");
  struct child child = start_program(&mask_before);
  int64_t stop_at = -1;  // when the host asked to stop
  bool killed = false;
  int status = 0;
  for (;;) {
    struct pollfd p[] = {{signals, POLLIN, 0}, {child.out, POLLIN, 0}, {child.err, POLLIN, 0}, {port, POLLIN, 0}};
    poll(p, 4, stop_at < 0 ? -1 : 100);
    if (p[1].revents) relay(&child.out, 'o');
    if (p[2].revents) relay(&child.err, 'e');
    if (p[3].revents) {
      char byte = 0;
      if (read(port, &byte, 1) <= 0) byte = 'K';  // the host is gone
      if (byte == 'K' && stop_at < 0) {
        stop_at = now_ms();
        write_text("/proc/sysrq-trigger", "w");  // the console then shows where blocked tasks stand
        kill(-child.pid, SIGTERM);
      }
    }
    if (p[0].revents) {
      struct signalfd_siginfo discard;
      while (read(signals, &discard, sizeof discard) > 0) continue;
    }
    if (reap(child.pid, &status)) break;
    if (stop_at >= 0 && !killed && now_ms() > stop_at + term_grace_ms) {
      kill(-1, SIGKILL);
      killed = true;
    }
    if (killed && now_ms() > stop_at + term_grace_ms + kill_grace_ms) break;
  }
  bool stuck = killed && now_ms() > stop_at + term_grace_ms + kill_grace_ms;
  sweep_processes();
  relay(&child.out, 'o');
  relay(&child.err, 'e');
  mark_kernel_log("the program ended");
  if (stuck)
    snprintf(verdict, size, "stuck");
  else if (stop_at >= 0)
    snprintf(verdict, size, "stopped");
  else if (WIFSIGNALED(status))
    snprintf(verdict, size, "signal %d", WTERMSIG(status));
  else
    snprintf(verdict, size, "exit %d", WEXITSTATUS(status));
}

// ---- files that come back: one newc archive, in frames

static char archive_buffer[frame_max];
static size_t archive_used;
static uint64_t archive_length;

static void archive_flush(void) {
  if (archive_used) send_frame('a', archive_buffer, archive_used);
  archive_used = 0;
}

static void archive_put(const void* data, size_t length) {
  const char* from = data;
  archive_length += length;
  while (length > 0) {
    size_t n = sizeof archive_buffer - archive_used;
    if (n > length) n = length;
    memcpy(archive_buffer + archive_used, from, n);
    archive_used += n;
    from += n;
    length -= n;
    if (archive_used == sizeof archive_buffer) archive_flush();
  }
}

static void archive_pad(void) { archive_put("\0\0\0", (size_t)(-archive_length & 3)); }

static void archive_head(const char* name, unsigned mode, uint64_t size) {
  char head[111];
  snprintf(head, sizeof head, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", 0, mode, 0, 0, 1, 0,
           (unsigned)size, 0, 0, 0, 0, (unsigned)strlen(name) + 1, 0);
  archive_put(head, 110);
  archive_put(name, strlen(name) + 1);
  archive_pad();
}

static void archive_file(const char* path, const struct stat* st) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    send_text('l', "cannot bring %s: %s", path, strerror(errno));
    return;
  }
  if (st->st_size == 0) {
    size_t length = 0;
    char* data = slurp(fd, unsized_file_max, &length);
    if (data) {
      archive_head(path + 1, S_IFREG | (st->st_mode & 0777), length);
      archive_put(data, length);
    } else {
      send_text('l', "cannot bring %s: %s", path, strerror(errno));
    }
    free(data);
  } else if ((uint64_t)st->st_size > UINT32_MAX) {
    send_text('l', "cannot bring %s: larger than 4 GiB", path);
  } else {
    char block[16 * 1024];
    uint64_t left = (uint64_t)st->st_size;
    archive_head(path + 1, S_IFREG | (st->st_mode & 0777), left);
    while (left > 0) {
      ssize_t n = read(fd, block, left < sizeof block ? left : sizeof block);
      if (n <= 0)
        memset(block, 0, (size_t)(n = left < sizeof block ? (ssize_t)left : (ssize_t)sizeof block));  // it shrank
      archive_put(block, (size_t)n);
      left -= (uint64_t)n;
    }
  }
  archive_pad();
  close(fd);
}

static int archive_entry(const char* path, const struct stat* st, int type, struct FTW* unused) {
  (void)unused;
  if (type == FTW_D && strcmp(path, "/out") != 0)
    archive_head(path + 1, S_IFDIR | (st->st_mode & 0777), 0);
  else if (type == FTW_F && S_ISREG(st->st_mode))
    archive_file(path, st);
  else if (type != FTW_D)
    send_text('l', "%s is neither a file nor a directory: left behind", path);
  return 0;
}

static void bring_back(void) {
  for (int i = 0; i < job.bring.count; i++)
    if (nftw(job.bring.item[i], archive_entry, 16, FTW_PHYS) != 0)
      send_text('l', "cannot bring %s: %s", job.bring.item[i], strerror(errno));
  archive_head("TRAILER!!!", 0, 0);
  archive_flush();
}

int main(void) {
  mount_file_systems();
  raise_loopback();
  const char* job_problem = read_job();
  const char* module_problem = load_modules();
  port = open_port("iovane.lab");
  if (port < 0) {
    dprintf(2, "lab init: no virtio port named iovane.lab (%s)\n", module_problem ? module_problem : strerror(errno));
    power_off();
  }
  if (job_problem) give_up("%s", job_problem);
  if (module_problem) give_up("%s", module_problem);
  apply_limits();
  bind_devices();
  char verdict[64];
  run_program(verdict, sizeof verdict);
  bring_back();
  send_text('x', "%s", verdict);
  await_goodbye();
  power_off();
}
