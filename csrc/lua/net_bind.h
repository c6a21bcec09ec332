/* What the net_*.c files share: each binds one subject of csrc/net. */
#ifndef MOONRABBIT_NET_BIND_H
#define MOONRABBIT_NET_BIND_H

#include "lua/compat.h"
#include "net/address.h"
#include "net/result.h"
#include "net/tls.h"

#define MRN_ADDRESS_TYPE "moonrabbit.net.Address"
#define MRN_RESOLVER_TYPE "moonrabbit.net.Resolver"
#define MRN_TLS_TYPE "moonrabbit.net.TlsContext"
#define MRN_STREAM_TYPE "moonrabbit.net.Stream"
#define MRN_SERVER_TYPE "moonrabbit.net.Server"
#define MRN_POLLER_TYPE "moonrabbit.net.Poller"
#define MRN_ALARM_TYPE "moonrabbit.net.Alarm"

/* Each makes its types and adds its functions to the module's table, on top of the stack. */
void mrn_bind_address(lua_State *L);
void mrn_bind_tls(lua_State *L);
void mrn_bind_stream(lua_State *L);
void mrn_bind_server(lua_State *L);
void mrn_bind_poll(lua_State *L);
void mrn_bind_alarm(lua_State *L);
void mrn_bind_process(lua_State *L);

/* nil, "again" | nil, "full" | nil, kind, text, temporary. */
int mrn_push_failure(lua_State *L, mrn_status status, const mrn_error *err);
/* A string without NUL bytes. */
const char *mrn_check_text(lua_State *L, int index);
int mrn_check_port(lua_State *L, int index);
void mrn_push_address(lua_State *L, const mrn_address *address);
/* The context at `index`, or NULL where there is nil. */
mrn_tls_context *mrn_opt_tls(lua_State *L, int index);
/* A closed stream on top of the stack; connect or adopt goes into it. */
struct mrn_stream *mrn_push_stream(lua_State *L);

#endif
