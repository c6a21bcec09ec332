#ifndef MOONRABBIT_NET_CLOCK_H
#define MOONRABBIT_NET_CLOCK_H

/* Monotonic seconds. */
double mrn_now(void);

#endif
