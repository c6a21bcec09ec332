/* A descriptor that becomes readable at a set time: for loops that can wait for descriptors only. */
#ifndef MOONRABBIT_NET_ALARM_H
#define MOONRABBIT_NET_ALARM_H

#include <stdbool.h>

/* -1 and errno: no descriptor is left, or the system has no such thing (ENOSYS). */
int mrn_alarm_new(void);
/* Readable from `seconds` on; zero or less: now. What was set before is forgotten, and so is that it
 * was readable. False and errno. */
bool mrn_alarm_set(int fd, double seconds);

#endif
