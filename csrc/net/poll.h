/* Which of many descriptors are ready: epoll where there is one, else poll(2). Level-triggered. */
#ifndef MOONRABBIT_NET_POLL_H
#define MOONRABBIT_NET_POLL_H

#include <stdbool.h>

#include "net/result.h"

enum { MRN_READ = 1, MRN_WRITE = 2 };

typedef struct mrn_poller mrn_poller;

/* NULL: out of memory or of descriptors (errno). */
mrn_poller *mrn_poller_new(void);
void mrn_poller_free(mrn_poller *poller);
/* `events`: MRN_READ | MRN_WRITE; 0 forgets the descriptor. Forgetting one that was closed before
 * is no error, and neither is adding one whose number was used before. */
mrn_status mrn_poller_set(mrn_poller *poller, int fd, unsigned events, mrn_error *err);
/* Seconds; negative: for ever. How many are ready; 0 at a timeout or a signal; -1 and errno. */
int mrn_poller_wait(mrn_poller *poller, double timeout);
/* The next ready descriptor of the last wait. Errors and hang-ups show as both events. */
bool mrn_poller_next(mrn_poller *poller, int *fd, unsigned *events);

#endif
