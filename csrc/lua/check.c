/* Arguments checked, and results pushed, the same way everywhere. */
#include "lua/binding.h"

/* ---- results ---- */

const char *mrl_status_name(mr_status status) {
  switch (status) {
    case MR_NO_MEMORY: return "memory";
    case MR_CLOSED: return "closed";
    case MR_BLOCKED: return "blocked";
    case MR_WINDOW_FULL: return "window";
    case MR_OVERFLOW: return "overflow";
    case MR_TOO_LARGE: return "too_large";
    case MR_BAD_ARGUMENT: return "bad_argument";
    case MR_NO_CHANNELS: return "no_channels";
    case MR_SETTLED: return "settled";
    case MR_UNKNOWN_TAG: return "unknown_tag";
    default: return "ok";
  }
}

int mrl_push_refusal(lua_State *L, mr_status status) {
  lua_pushnil(L);
  lua_pushstring(L, mrl_status_name(status));
  return 2;
}

int mrl_push_done(lua_State *L, mr_status status) {
  if (status < 0) return mrl_push_refusal(L, status);
  lua_pushboolean(L, 1);
  return 1;
}

int mrl_push_flush(lua_State *L, mr_status status) {
  if (status < 0) return mrl_push_refusal(L, status);
  lua_pushboolean(L, 1);
  lua_pushboolean(L, status == MR_FLUSH);
  return 2;
}

/* Too large for a lua_Integer: the nearest float. */
void mrl_push_uint64(lua_State *L, uint64_t n) {
  if (n <= INT64_MAX)
    mr_push_int64(L, (int64_t)n);
  else
    lua_pushnumber(L, (lua_Number)n);
}

/* ---- arguments ---- */

amqp_bytes_t mrl_check_shortstr(lua_State *L, int i) {
  amqp_bytes_t s = mrl_check_string(L, i);
  if (s.len > 255) luaL_argerror(L, i, "longer than 255 bytes");
  return s;
}

bool mrl_check_boolean(lua_State *L, int i) {
  luaL_checktype(L, i, LUA_TBOOLEAN);
  return lua_toboolean(L, i);
}

bool mrl_opt_boolean(lua_State *L, int i, bool otherwise) {
  return lua_isnoneornil(L, i) ? otherwise : mrl_check_boolean(L, i);
}

uint64_t mrl_check_uint(lua_State *L, int i, uint64_t max) {
  int64_t n = 0;
  luaL_checktype(L, i, LUA_TNUMBER);
  if (!mr_exact_integer(L, i, &n)) luaL_argerror(L, i, "not an integer");
  if (n < 0 || (uint64_t)n > max) luaL_argerror(L, i, "out of range");
  return (uint64_t)n;
}

mr_settle_kind mrl_check_settle(lua_State *L, int i, bool with_ack) {
  const char *kind = mrl_check_string(L, i).bytes;
  if (with_ack && strcmp(kind, "ack") == 0) return MR_SETTLE_ACK;
  if (strcmp(kind, "nack") == 0) return MR_SETTLE_NACK;
  if (strcmp(kind, "reject") == 0) return MR_SETTLE_REJECT;
  luaL_argerror(L, i,
                with_ack ? "'ack', 'nack' or 'reject' expected" : "'nack' or 'reject' expected");
  return MR_SETTLE_ACK;
}
