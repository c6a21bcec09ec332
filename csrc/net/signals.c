#include "net/signals.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "net/descriptor.h"
#include "net/pin.h"

static const struct {
  const char *name;
  int number;
} known[] = {
    {"INT", SIGINT},   {"TERM", SIGTERM}, {"HUP", SIGHUP},   {"QUIT", SIGQUIT},
    {"USR1", SIGUSR1}, {"USR2", SIGUSR2}, {"CHLD", SIGCHLD}, {"WINCH", SIGWINCH},
    {"ALRM", SIGALRM}, {"CONT", SIGCONT}, {"TSTP", SIGTSTP},
};
#define KNOWN ((int)(sizeof known / sizeof known[0]))

static volatile sig_atomic_t arrived[KNOWN]; /* set by the handler, cleared by mrn_signal_next */
static volatile sig_atomic_t anything;
static volatile sig_atomic_t last_chance[KNOWN]; /* exit_on_second */
static volatile sig_atomic_t chances;            /* how many of those arrived */
static struct sigaction before[KNOWN];
static bool watched[KNOWN];
static int ends[2] = {-1, -1};

static int slot_of(int number) {
  for (int i = 0; i < KNOWN; i++) {
    if (known[i].number == number) return i;
  }
  return -1;
}

int mrn_signal_number(const char *name) {
  if (strncmp(name, "SIG", 3) == 0) name += 3;
  for (int i = 0; i < KNOWN; i++) {
    if (strcmp(known[i].name, name) == 0) return known[i].number;
  }
  return 0;
}

const char *mrn_signal_name(int number) {
  int slot = slot_of(number);
  return slot < 0 ? "?" : known[slot].name;
}

static void handler(int number) {
  int code = errno, slot = slot_of(number);
  if (slot >= 0) {
    arrived[slot] = 1;
    anything = 1;
    if (last_chance[slot] && ++chances >= 2) _exit(128 + number);
    ssize_t written = write(ends[1], "", 1);
    (void)written; /* a full pipe wakes the loop as well */
  }
  errno = code;
}

bool mrn_signal_on(int number, bool exit_on_second) {
  int slot = slot_of(number);
  struct sigaction action;
  if (slot < 0) {
    errno = EINVAL;
    return false;
  }
  if (ends[0] < 0 && !mrn_pipe(ends)) return false;
  mrn_pin(); /* the handler stays even when this module is unloaded */
  last_chance[slot] = exit_on_second;
  if (exit_on_second) chances = 0;
  if (watched[slot]) return true;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  arrived[slot] = 0;
  watched[slot] = sigaction(number, &action, &before[slot]) == 0;
  return watched[slot];
}

void mrn_signal_off(int number) {
  int slot = slot_of(number);
  if (slot < 0 || !watched[slot]) return;
  sigaction(number, &before[slot], NULL);
  watched[slot] = false;
  arrived[slot] = last_chance[slot] = 0;
}

int mrn_signal_next(void) {
  char bytes[64];
  if (!anything) return 0;
  for (int i = 0; i < KNOWN; i++) {
    if (arrived[i]) {
      arrived[i] = 0;
      return known[i].number;
    }
  }
  /* The pipe is emptied before the flags are looked at once more: a signal in between leaves a
   * byte behind, and the loop comes back. */
  anything = 0;
  while (read(ends[0], bytes, sizeof bytes) > 0) continue;
  for (int i = 0; i < KNOWN; i++) {
    if (arrived[i]) anything = 1;
  }
  return anything ? mrn_signal_next() : 0;
}

int mrn_signal_fd(void) { return ends[0]; }
