#include "net/alarm.h"

#include <errno.h>

#ifdef __linux__
#include <sys/timerfd.h>

/* Longer than this is as good as for ever, and fits a time_t of 32 bits. */
#define LONGEST 1e9

int mrn_alarm_new(void) { return timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC); }

bool mrn_alarm_set(int fd, double seconds) {
  struct itimerspec when = {{0, 0}, {0, 1}}; /* a zero would switch it off */
  if (seconds > LONGEST) seconds = LONGEST;
  if (seconds > 0) {
    when.it_value.tv_sec = (time_t)seconds;
    when.it_value.tv_nsec = (long)((seconds - (double)when.it_value.tv_sec) * 1e9) + 1;
    if (when.it_value.tv_nsec > 999999999) when.it_value.tv_nsec = 999999999;
  }
  return timerfd_settime(fd, 0, &when, NULL) == 0;
}

#else

int mrn_alarm_new(void) {
  errno = ENOSYS;
  return -1;
}

bool mrn_alarm_set(int fd, double seconds) {
  (void)fd;
  (void)seconds;
  errno = ENOSYS;
  return false;
}

#endif
