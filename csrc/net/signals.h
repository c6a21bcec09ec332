/*
 * Signals as something a loop can wait for. The handler counts and writes one byte to a pipe that
 * every poller watches; it does nothing else, but for the one signal too many (see mrn_signal_on).
 * Signals belong to the process: these functions are for one thread.
 */
#ifndef MOONRABBIT_NET_SIGNALS_H
#define MOONRABBIT_NET_SIGNALS_H

#include <stdbool.h>

/* "INT", "TERM", "HUP", "USR1" ..., with or without "SIG"; 0 for anything else. */
int mrn_signal_number(const char *name);
const char *mrn_signal_name(int number);

/* Starts watching. `exit_on_second`: from the second signal on that was watched like this, of
 * whichever number, the process exits at once with 128 + number, even while a handler of the
 * program is busy. False and errno when the system refuses. */
bool mrn_signal_on(int number, bool exit_on_second);
/* Restores what was there before; harmless when it is not watched. */
void mrn_signal_off(int number);
/* A signal that arrived and was not asked for yet; 0: none. */
int mrn_signal_next(void);
/* Readable once one arrived; -1 before the first mrn_signal_on. */
int mrn_signal_fd(void);

#endif
