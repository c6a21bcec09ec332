/* The Engine userdata: configuration, bytes, time. Its events are in pump.c. */
#include "lua/binding.h"

/* ---- the port: how moonrabbit.net moves bytes ---- */

/* No input while an event is looked at, which lies in the buffer, and while a queue is full. */
static bool is_held(const mrl_engine *e) { return e->busy || (e->n_full && !e->admitted); }

static uint8_t *port_rx_reserve(void *ctx, size_t *space) {
  mrl_engine *e = ctx;
  *space = 0;
  return is_held(e) ? NULL : mr_engine_rx_reserve(e->handle, space);
}

static void port_rx_commit(void *ctx, size_t n, double now) {
  mr_engine_rx_commit(((mrl_engine *)ctx)->handle, n, now);
}

static const uint8_t *port_tx_peek(void *ctx, size_t *len) {
  ((mrl_engine *)ctx)->told = false;
  return mr_engine_tx_peek(((mrl_engine *)ctx)->handle, len);
}

static void port_tx_consume(void *ctx, size_t n, double now) {
  mr_engine_tx_consume(((mrl_engine *)ctx)->handle, n, now);
}

static const mr_port_calls port_calls = {MR_PORT_VERSION, port_rx_reserve, port_rx_commit,
                                         port_tx_peek, port_tx_consume};

/* ---- configuration ---- */

static int bad_config(lua_State *L, const char *name, const char *what) {
  return luaL_error(L, "config '%s': %s", name, what);
}

static amqp_bytes_t config_string(lua_State *L, const char *name) {
  if (lua_type(L, -1) != LUA_TSTRING) bad_config(L, name, "string expected");
  return mrl_check_string(L, -1);
}

static double config_number(lua_State *L, const char *name) {
  if (lua_type(L, -1) != LUA_TNUMBER) bad_config(L, name, "number expected");
  return lua_tonumber(L, -1);
}

static uint64_t config_uint(lua_State *L, const char *name, uint64_t max) {
  double n = config_number(L, name);
  if (!(n >= 0 && n <= (double)max)) bad_config(L, name, "out of range");
  return (uint64_t)n;
}

static const char *config_mechanism(lua_State *L, const char *name) {
  const char *mechanism = config_string(L, name).bytes;
  if (strcmp(mechanism, "PLAIN") != 0 && strcmp(mechanism, "AMQPLAIN") != 0 &&
      strcmp(mechanism, "EXTERNAL") != 0)
    bad_config(L, name, "'PLAIN', 'AMQPLAIN' or 'EXTERNAL' expected");
  return mechanism;
}

/* The value of `name` is on top of the stack. */
static void read_config(lua_State *L, const char *name, mr_config *c) {
  if (strcmp(name, "vhost") == 0)
    c->vhost = config_string(L, name);
  else if (strcmp(name, "user") == 0)
    c->user = config_string(L, name);
  else if (strcmp(name, "password") == 0)
    c->password = config_string(L, name);
  else if (strcmp(name, "mechanism") == 0)
    c->mechanism = config_mechanism(L, name);
  else if (strcmp(name, "heartbeat") == 0)
    c->heartbeat = (uint16_t)config_uint(L, name, UINT16_MAX);
  else if (strcmp(name, "frame_max") == 0)
    c->frame_max = (uint32_t)config_uint(L, name, UINT32_MAX);
  else if (strcmp(name, "channel_max") == 0)
    c->channel_max = (uint16_t)config_uint(L, name, UINT16_MAX);
  else if (strcmp(name, "max_message_size") == 0)
    c->max_message_size = config_uint(L, name, UINT64_C(1) << 53);
  else if (strcmp(name, "max_buffer") == 0)
    c->max_buffer = (size_t)config_uint(L, name, UINT64_C(1) << 53);
  else if (strcmp(name, "ack_delay") == 0)
    c->ack_delay = config_number(L, name);
  else if (strcmp(name, "client_properties") == 0)
    mrl_to_table(L, -1, name, false, &c->client_properties);
  else
    luaL_error(L, "unknown config '%s'", name);
}

static void read_configs(lua_State *L, int i, mr_config *c) {
  memset(c, 0, sizeof *c);
  c->vhost = mrl_bytes("/", 1);
  c->user = c->password = mrl_bytes("", 0);
  c->ack_delay = -1;
  mrl_arena_reset(&mrl_get_state(L)->arena);
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    if (lua_type(L, -2) != LUA_TSTRING) luaL_error(L, "the name of a config must be a string");
    read_config(L, lua_tostring(L, -2), c);
  }
}

int mrl_new_engine(lua_State *L) {
  mr_config config;
  mr_error err;
  luaL_checktype(L, 1, LUA_TTABLE);
  mrl_engine *e = mr_new_userdata(L, sizeof *e);
  memset(e, 0, sizeof *e);
  e->out_first = 1;
  lua_pushvalue(L, lua_upvalueindex(MR_UP_ENGINE));
  lua_setmetatable(L, -2);
  lua_createtable(L, 4, 0);
  for (int slot = MR_ENGINE_CHANNELS; slot <= MR_ENGINE_OUTBOX; slot++) {
    lua_newtable(L);
    lua_rawseti(L, -2, slot);
  }
  mr_set_uservalue(L, -2);
  read_configs(L, 1, &config);
  e->handle = mr_engine_new(&config, &err);
  if (!e->handle) return luaL_error(L, "engine: %s", err.text);
  e->port.calls = &port_calls;
  e->port.ctx = e;
  return 1;
}

mrl_engine *mrl_check_engine(lua_State *L, int i) {
  mrl_engine *e = mrl_check(L, i, MR_UP_ENGINE, MR_ENGINE_TYPE);
  if (!e->handle) luaL_argerror(L, i, "the engine is gone");
  return e;
}

static int engine_gc(lua_State *L) {
  mrl_engine *e = mrl_check(L, 1, MR_UP_ENGINE, MR_ENGINE_TYPE);
  mr_engine *handle = e->handle;
  e->handle = NULL;
  e->port.ctx = NULL;
  mr_engine_free(handle);
  return 0;
}

/* ---- bytes ---- */

static int engine_start(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  return mrl_push_done(L, mr_engine_start(e->handle, luaL_checknumber(L, 2)));
}

static int engine_feed(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  amqp_bytes_t bytes = mrl_check_string(L, 2);
  double now = luaL_checknumber(L, 3);
  size_t taken = is_held(e) ? 0 : mr_engine_feed(e->handle, bytes.bytes, bytes.len, now);
  lua_pushinteger(L, (lua_Integer)taken);
  return 1;
}

/* Drains of less leave nothing behind: such are those with a password in them. */
enum { ASIDE_LEAST = 4096 };

/* Pushes memory for `size` bytes: what the last drain has left, where that does. */
static char *take_aside(lua_State *L, size_t size) {
  if (size < ASIDE_LEAST) return lua_newuserdata(L, size);
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, MR_ENGINE_ASIDE);
  if (!lua_isuserdata(L, -1) || lua_rawlen(L, -1) < size) {
    lua_pop(L, 2);
    return lua_newuserdata(L, size);
  }
  lua_pushnil(L); /* a finalizer may drain as well */
  lua_rawseti(L, -3, MR_ENGINE_ASIDE);
  lua_remove(L, -2);
  return lua_touserdata(L, -1);
}

/* Leaves the memory on top of the stack to the next drain, and pops it. */
static void leave_aside(lua_State *L, size_t size) {
  if (size >= ASIDE_LEAST) {
    mr_get_uservalue(L, 1);
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, MR_ENGINE_ASIDE);
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
}

/* Pushes the string of at most `room` waiting bytes. They are copied aside first: a new string may run finalizers,
 * which may write to the output buffer. Returns whether anything is left. */
static bool drain_some(lua_State *L, mrl_engine *e, size_t room, double now) {
  char *copy = take_aside(L, room);
  size_t used = 0, len;
  const uint8_t *bytes;
  while ((bytes = mr_engine_tx_peek(e->handle, &len)) != NULL && len > 0 && used < room) {
    if (len > room - used) len = room - used;
    memcpy(copy + used, bytes, len);
    mr_engine_tx_consume(e->handle, len, now);
    used += len;
  }
  lua_pushlstring(L, copy, used);
  lua_insert(L, -2);
  leave_aside(L, room);
  return bytes != NULL && len > 0;
}

static int engine_drain(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  double now = luaL_checknumber(L, 2);
  size_t len;
  size_t most = (size_t)luaL_optnumber(L, 3, 0);
  lua_settop(L, 2);
  lua_pushliteral(L, "");
  e->told = false;
  if (most > 0) {
    size_t pending = mr_engine_tx_pending(e->handle);
    if (pending > 0) drain_some(L, e, pending < most ? pending : most, now);
    return 1;
  }
  while (mr_engine_tx_peek(e->handle, &len) != NULL && len > 0) {
    size_t pending = mr_engine_tx_pending(e->handle);
    bool more = drain_some(L, e, pending > len ? pending : len, now);
    if (lua_gettop(L) > 3) lua_concat(L, 2);
    if (!more) break;
  }
  return 1;
}

static int engine_pending(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)mr_engine_tx_pending(mrl_check_engine(L, 1)->handle));
  return 1;
}

/* Lifts the hold of a full queue for one more buffer, until its next delivery. */
static int engine_admit(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  e->admitted = true;
  return 0;
}

static int engine_is_full(lua_State *L) {
  lua_pushboolean(L, mrl_check_engine(L, 1)->n_full > 0);
  return 1;
}

static int engine_eof(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  mr_engine_eof(e->handle,
                lua_isnoneornil(L, 2) ? NULL : (const char *)mrl_check_string(L, 2).bytes);
  return 0;
}

/* ---- time ---- */

static int push_deadline(lua_State *L, double deadline) {
  if (deadline < 0)
    lua_pushnil(L);
  else
    lua_pushnumber(L, deadline);
  return 1;
}

static int engine_deadline(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  return push_deadline(L, mr_engine_deadline(e->handle, luaL_checknumber(L, 2)));
}

static int engine_silence_deadline(lua_State *L) {
  return push_deadline(L, mr_engine_silence_deadline(mrl_check_engine(L, 1)->handle));
}

static int engine_tick(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  if (!e->busy) mr_engine_tick(e->handle, luaL_checknumber(L, 2));
  return 0;
}

static int engine_pause(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  mr_engine_pause(e->handle, mrl_check_boolean(L, 2), luaL_checknumber(L, 3));
  return 0;
}

/* ---- the connection ---- */

static int engine_is_open(lua_State *L) {
  lua_pushboolean(L, mr_engine_is_open(mrl_check_engine(L, 1)->handle));
  return 1;
}

static int engine_is_blocked(lua_State *L) {
  lua_pushboolean(L, mr_engine_is_blocked(mrl_check_engine(L, 1)->handle));
  return 1;
}

static int engine_hold(lua_State *L) {
  mr_engine_hold(mrl_check_engine(L, 1)->handle, mrl_check_boolean(L, 2));
  return 0;
}

static int engine_tuned(lua_State *L) {
  mr_tuned tuned = mr_engine_tuned(mrl_check_engine(L, 1)->handle);
  lua_pushinteger(L, tuned.channel_max);
  lua_pushinteger(L, (lua_Integer)tuned.frame_max);
  lua_pushinteger(L, tuned.heartbeat);
  return 3;
}

static int engine_server_properties(lua_State *L) {
  const amqp_table_t *table = mr_engine_server_properties(mrl_check_engine(L, 1)->handle);
  if (table)
    mrl_push_table(L, table, NULL);
  else
    lua_newtable(L);
  return 1;
}

static int engine_close(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  uint16_t code =
      lua_isnoneornil(L, 2) ? AMQP_REPLY_SUCCESS : (uint16_t)mrl_check_uint(L, 2, UINT16_MAX);
  const char *text = lua_isnoneornil(L, 3) ? "" : mrl_check_shortstr(L, 3).bytes;
  return mrl_push_done(L, mr_engine_close(e->handle, code, text));
}

static int engine_update_secret(lua_State *L) {
  mrl_engine *e = mrl_check_engine(L, 1);
  amqp_bytes_t secret = mrl_check_string(L, 2);
  amqp_bytes_t reason = lua_isnoneornil(L, 3) ? mrl_bytes("", 0) : mrl_check_shortstr(L, 3);
  return mrl_push_done(L, mr_engine_update_secret(e->handle, secret, reason));
}

const luaL_Reg mrl_engine_functions[] = {{"start", engine_start},
                                         {"feed", engine_feed},
                                         {"drain", engine_drain},
                                         {"pending", engine_pending},
                                         {"admit", engine_admit},
                                         {"is_full", engine_is_full},
                                         {"eof", engine_eof},
                                         {"deadline", engine_deadline},
                                         {"silence_deadline", engine_silence_deadline},
                                         {"tick", engine_tick},
                                         {"pause", engine_pause},
                                         {"is_open", engine_is_open},
                                         {"is_blocked", engine_is_blocked},
                                         {"hold", engine_hold},
                                         {"tuned", engine_tuned},
                                         {"server_properties", engine_server_properties},
                                         {"close", engine_close},
                                         {"update_secret", engine_update_secret},
                                         {"pump", mrl_pump},
                                         {"open_channel", mrl_open_channel},
                                         {"__gc", engine_gc},
                                         {NULL, NULL}};
