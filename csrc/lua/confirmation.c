/*
 * Confirmation: one publish of a confirm channel. The core knows what is unsettled, and counts the
 * rest as acked; so failures are noted here when the pump meets them (see pump.c).
 */
#include <stdio.h>

#include "lua/binding.h"

static mrl_confirmation *check_confirmation(lua_State *L) {
  return mrl_check_tag(L, 1, MR_IS_CONFIRMATION, sizeof(mrl_confirmation));
}

static mr_outcome last_outcome(mrl_confirmation *c) {
  if (c->outcome != MR_PENDING) return (mr_outcome)c->outcome;
  if (!c->channel->handle) return MR_LOST;
  mr_outcome outcome = mr_confirm_outcome(c->channel->handle, c->seq);
  if (outcome == MR_RETURNED) return MR_PENDING;
  if (outcome != MR_PENDING) c->outcome = (uint8_t)outcome;
  return outcome;
}

static mr_outcome outcome_of(mrl_confirmation *c) {
  mr_outcome outcome = last_outcome(c);
  return c->held && outcome != MR_ACKED ? MR_PENDING : outcome;
}

int mrl_acked(lua_State *L) {
  mr_outcome outcome = outcome_of(check_confirmation(L));
  if (outcome == MR_ACKED)
    lua_pushboolean(L, 1);
  else if (outcome == MR_PENDING)
    lua_pushboolean(L, 0);
  else
    lua_pushnil(L);
  return 1;
}

static const char *outcome_name(mr_outcome outcome) {
  switch (outcome) {
    case MR_ACKED: return "acked";
    case MR_NACKED: return "nacked";
    case MR_UNROUTABLE: return "unroutable";
    case MR_LOST: return "lost";
    default: return "pending";
  }
}

int mrl_outcome(lua_State *L) {
  mrl_confirmation *c = check_confirmation(L);
  lua_pushstring(L, outcome_name(outcome_of(c)));
  mr_push_int64(L, (int64_t)c->seq);
  if (c->number)
    mr_push_int64(L, (int64_t)c->number);
  else
    lua_pushnil(L);
  return 3;
}

/* core.conclude(confirmation, outcome): it is not published again. */
int mrl_conclude(lua_State *L) {
  static const char *const names[] = {"nacked", "unroutable", "lost", NULL};
  static const mr_outcome outcomes[] = {MR_NACKED, MR_UNROUTABLE, MR_LOST};
  mrl_confirmation *c = check_confirmation(L);
  c->held = false;
  c->outcome = (uint8_t)outcomes[luaL_checkoption(L, 2, NULL, names)];
  return 0;
}

/* core.take_acked(confirmations, kept, first, last, size): two rings, of the confirmations and of what
 * was published, whose place for number n is (n - 1) % size + 1. Empties the latter from `first` on, as
 * long as the confirmation is acked and what was published is a string. */
int mrl_take_acked(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  luaL_checktype(L, 2, LUA_TTABLE);
  uint64_t n = mrl_check_uint(L, 3, INT64_MAX), last = mrl_check_uint(L, 4, INT64_MAX);
  uint64_t size = mrl_check_uint(L, 5, INT32_MAX);
  size_t bytes = 0;
  luaL_argcheck(L, size > 0 && n > 0, 5, "out of range");
  for (; n <= last; n++) {
    int at = (int)((n - 1) % size) + 1;
    lua_settop(L, 5);
    lua_rawgeti(L, 2, at);
    if (lua_type(L, 6) != LUA_TSTRING) break;
    lua_rawgeti(L, 1, at);
    mrl_confirmation *c = mrl_test_tag(L, 7, MR_IS_CONFIRMATION, sizeof *c);
    if (!c || outcome_of(c) != MR_ACKED) break;
    bytes += (size_t)lua_rawlen(L, 6);
    lua_pushboolean(L, 0);
    lua_rawseti(L, 2, at);
  }
  mr_push_int64(L, (int64_t)n);
  mr_push_int64(L, (int64_t)bytes);
  return 2;
}

static int confirmation_tostring(lua_State *L) {
  mrl_confirmation *c = check_confirmation(L);
  char text[80];
  snprintf(text, sizeof text, "moonrabbit.confirmation: channel %u, %llu %s", c->channel->id,
           (unsigned long long)c->seq, outcome_name(outcome_of(c)));
  lua_pushstring(L, text);
  return 1;
}

const luaL_Reg mrl_confirmation_functions[] = {{"__tostring", confirmation_tostring}, {NULL, NULL}};
