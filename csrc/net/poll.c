#include "net/poll.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "net/signals.h"

#if defined(__linux__) && !defined(MRN_FORCE_POLL)
#define HAVE_EPOLL 1
#include <sys/epoll.h>
#else
#include <poll.h>
#endif

/* Rounded up: to wake a moment before the deadline is to wake twice. */
static int milliseconds(double timeout) {
  if (timeout < 0) return -1;
  double ms = timeout * 1000.0;
  if (ms >= (double)INT_MAX) return INT_MAX;
  int whole = (int)ms;
  return (double)whole < ms ? whole + 1 : whole;
}

#ifdef HAVE_EPOLL

#define BATCH 256

struct mrn_poller {
  int epoll;
  int signal_fd; /* in the set; -1 before the first signal is watched */
  int count, next;
  struct epoll_event ready[BATCH];
};

mrn_poller *mrn_poller_new(void) {
  mrn_poller *poller = calloc(1, sizeof *poller);
  if (poller == NULL) return NULL;
  poller->signal_fd = -1;
  poller->epoll = epoll_create1(EPOLL_CLOEXEC);
  if (poller->epoll >= 0) return poller;
  free(poller);
  return NULL;
}

void mrn_poller_free(mrn_poller *poller) {
  if (poller == NULL) return;
  close(poller->epoll);
  free(poller);
}

/* The kernel knows which descriptors are in the set, and drops those that are closed: so a record
 * of our own could only be wrong. */
static int control(int epoll, int fd, uint32_t events) {
  struct epoll_event event;
  memset(&event, 0, sizeof event);
  event.events = events;
  event.data.fd = fd;
  if (events == 0) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, fd, &event);
    return 0;
  }
  if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event) == 0) return 0;
  return errno == ENOENT ? epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) : -1;
}

/* What is left of the last batch must not speak of a descriptor that was forgotten meanwhile. */
static void drop_ready(mrn_poller *poller, int fd) {
  for (int i = poller->next; i < poller->count; i++) {
    if (poller->ready[i].data.fd == fd) poller->ready[i].events = 0;
  }
}

mrn_status mrn_poller_set(mrn_poller *poller, int fd, unsigned events, mrn_error *err) {
  uint32_t wanted = (events & MRN_READ ? (uint32_t)(EPOLLIN | EPOLLRDHUP) : 0u) |
                    (events & MRN_WRITE ? (uint32_t)EPOLLOUT : 0u);
  if (wanted == 0) drop_ready(poller, fd);
  if (control(poller->epoll, fd, wanted) == 0) return MRN_OK;
  return mrn_fail_errno(err, MRN_CLOSED, errno);
}

static void watch_signals(mrn_poller *poller) {
  int fd = mrn_signal_fd();
  if (fd == poller->signal_fd || fd < 0) return;
  if (control(poller->epoll, fd, EPOLLIN) == 0) poller->signal_fd = fd;
}

int mrn_poller_wait(mrn_poller *poller, double timeout) {
  watch_signals(poller);
  poller->next = 0;
  poller->count = epoll_wait(poller->epoll, poller->ready, BATCH, milliseconds(timeout));
  if (poller->count >= 0) return poller->count;
  poller->count = 0;
  return errno == EINTR ? 0 : -1;
}

bool mrn_poller_next(mrn_poller *poller, int *fd, unsigned *events) {
  while (poller->next < poller->count) {
    const struct epoll_event *event = &poller->ready[poller->next++];
    *events = (event->events & (EPOLLIN | EPOLLRDHUP) ? (unsigned)MRN_READ : 0u) |
              (event->events & EPOLLOUT ? (unsigned)MRN_WRITE : 0u);
    if (event->events & (EPOLLERR | EPOLLHUP)) *events = MRN_READ | MRN_WRITE;
    *fd = event->data.fd;
    if (*events != 0 && *fd != poller->signal_fd) return true;
  }
  return false;
}

#else

struct mrn_poller {
  struct pollfd *set; /* [0] is the signals' pipe */
  int used, room, next;
};

mrn_poller *mrn_poller_new(void) {
  mrn_poller *poller = calloc(1, sizeof *poller);
  if (poller == NULL) return NULL;
  poller->room = 16;
  poller->set = calloc((size_t)poller->room, sizeof *poller->set);
  if (poller->set == NULL) {
    free(poller);
    return NULL;
  }
  poller->set[0].fd = -1;
  poller->used = poller->next = 1;
  return poller;
}

void mrn_poller_free(mrn_poller *poller) {
  if (poller == NULL) return;
  free(poller->set);
  free(poller);
}

static int find(const mrn_poller *poller, int fd) {
  for (int i = 1; i < poller->used; i++) {
    if (poller->set[i].fd == fd) return i;
  }
  return 0;
}

/* Leaves a hole, which poll(2) skips and which the next wait closes: a walk over the last results
 * may be under way. */
static void forget(mrn_poller *poller, int fd) {
  int i = find(poller, fd);
  if (i != 0) poller->set[i].fd = -1;
}

static bool grow(mrn_poller *poller) {
  if (poller->used < poller->room) return true;
  struct pollfd *bigger = realloc(poller->set, (size_t)poller->room * 2 * sizeof *bigger);
  if (bigger == NULL) return false;
  poller->set = bigger;
  poller->room *= 2;
  return true;
}

mrn_status mrn_poller_set(mrn_poller *poller, int fd, unsigned events, mrn_error *err) {
  if (events == 0) {
    forget(poller, fd);
    return MRN_OK;
  }
  int i = find(poller, fd);
  if (i == 0) {
    if (!grow(poller)) return mrn_fail_errno(err, MRN_CLOSED, ENOMEM);
    i = poller->used++;
    poller->set[i].fd = fd;
    poller->set[i].revents = 0;
  }
  poller->set[i].events =
      (short)((events & MRN_READ ? POLLIN : 0) | (events & MRN_WRITE ? POLLOUT : 0));
  return MRN_OK;
}

static void close_holes(mrn_poller *poller) {
  int kept = 1;
  for (int i = 1; i < poller->used; i++) {
    if (poller->set[i].fd >= 0) poller->set[kept++] = poller->set[i];
  }
  poller->used = kept;
}

int mrn_poller_wait(mrn_poller *poller, double timeout) {
  close_holes(poller);
  poller->set[0].fd = mrn_signal_fd();
  poller->set[0].events = POLLIN;
  int count = poll(poller->set, (nfds_t)poller->used, milliseconds(timeout));
  poller->next = count > 0 ? 1 : poller->used;
  if (count >= 0) return count;
  return errno == EINTR ? 0 : -1;
}

bool mrn_poller_next(mrn_poller *poller, int *fd, unsigned *events) {
  while (poller->next < poller->used) {
    struct pollfd *entry = &poller->set[poller->next++];
    int found = entry->revents;
    entry->revents = 0;
    if (entry->fd < 0 || found == 0) continue;
    *events =
        (found & POLLIN ? (unsigned)MRN_READ : 0u) | (found & POLLOUT ? (unsigned)MRN_WRITE : 0u);
    if (found & (POLLERR | POLLHUP | POLLNVAL)) *events = MRN_READ | MRN_WRITE;
    *fd = entry->fd;
    return true;
  }
  return false;
}

#endif
