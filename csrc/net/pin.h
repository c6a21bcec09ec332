#ifndef MOONRABBIT_NET_PIN_H
#define MOONRABBIT_NET_PIN_H

/* Keeps this shared object mapped until the process ends. Closing a Lua state unloads its modules,
 * which must not happen under a running thread or an installed signal handler. */
void mrn_pin(void);

#endif
