/*
 * How moonrabbit.net meets an engine of moonrabbit.core without linking to it: the userdata with
 * the metatable MR_ENGINE_TYPE starts with an mr_port. Two shared objects, one small contract.
 */
#ifndef MOONRABBIT_PORT_H
#define MOONRABBIT_PORT_H

#include <stddef.h>
#include <stdint.h>

#define MR_ENGINE_TYPE "moonrabbit.engine"
#define MR_PORT_VERSION 1

typedef struct {
  int version; /* MR_PORT_VERSION */
  /* As mr_engine_rx_reserve, rx_commit, tx_peek and tx_consume; `ctx` is mr_port.ctx. */
  uint8_t *(*rx_reserve)(void *ctx, size_t *space);
  void (*rx_commit)(void *ctx, size_t n, double now);
  const uint8_t *(*tx_peek)(void *ctx, size_t *len);
  void (*tx_consume)(void *ctx, size_t n, double now);
} mr_port_calls;

typedef struct {
  const mr_port_calls *calls; /* static storage */
  void *ctx;                  /* NULL once the engine has been closed: treat as "closed" */
} mr_port;

#endif
