/* Processes of our own, and what a service tells the system's manager. */
#ifndef MOONRABBIT_NET_PROCESS_H
#define MOONRABBIT_NET_PROCESS_H

#include <stdbool.h>
#include <sys/types.h>

/* Starts a program, found as a shell finds it; argv ends with NULL. It ends with SIGTERM when this
 * process dies (Linux). `line`, unless NULL, gets our end of a pair of sockets, whose other end is
 * the program's descriptor 3. The child's pid; -1 and errno: no process, or no such program. */
pid_t mrn_spawn(char *const argv[], int *line);
/* Our end of such a line, when this process is the child: a descriptor; -1 and errno. */
int mrn_parent(void);
/* Whether a child has ended: 1, and its status as waitpid has it; 0: it runs; -1 and errno. */
int mrn_wait(pid_t pid, int *status);
/* One datagram to a unix socket; '@' in front: an abstract one. False and errno. */
bool mrn_datagram(const char *path, const char *bytes, size_t length);

#endif
