/*
 * Confirmation: one publish of a confirm channel. The core knows what is unsettled, and counts the
 * rest as acked; so failures are noted here when the pump meets them (see pump.c).
 */
#include <stdio.h>

#include "lua/binding.h"

static mrl_confirmation *check_confirmation(lua_State *L) {
  return mrl_check(L, 1, MR_UP_CONFIRMATION, MR_CONFIRMATION_TYPE);
}

static mr_outcome outcome_of(mrl_confirmation *c) {
  if (c->outcome != MR_PENDING) return (mr_outcome)c->outcome;
  if (!c->channel->handle) return MR_LOST;
  mr_outcome outcome = mr_confirm_outcome(c->channel->handle, c->seq);
  if (outcome == MR_RETURNED) return MR_PENDING;
  if (outcome != MR_PENDING) c->outcome = (uint8_t)outcome;
  return outcome;
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
