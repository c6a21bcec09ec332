--- Confirmation: how a publish of a confirm channel ends.
--
-- An object of the C core: `publish_async` and `send_async` return one at no cost worth naming. It may
-- be dropped; the broker's answer is then forgotten (a failure still shows in `wait_for_confirms`).
-- @module moonrabbit.confirmation

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local pollable = require "moonrabbit.pollable"

local core_acked, core_outcome, keeper = core.acked, core.outcome, pollable.keeper_of

---@class moonrabbit.Confirmation : moonrabbit.Pollable
local methods = core.confirmation_methods

pollable.extend(methods, "Confirmation")

--- Waits until the broker has answered: true when it has the message. err.kind: `nacked`,
--- `unroutable`, `timeout` (unknown; wait again if you like), `closed` or `channel` (unknown).
---@param timeout number? seconds; 0: only look; default: the channel's
---@return true|nil, moonrabbit.Error?
function methods:wait(timeout)
  if core_acked(self) then return true end
  if timeout ~= nil then options.argument("Confirmation:wait", "timeout", timeout, options.seconds) end
  return keeper(self):_wait(self, timeout, false)
end

--- How it ended, in a word.
---@return "pending"|"acked"|"nacked"|"unroutable"|"lost" outcome lost: the connection or channel ended first
function methods:outcome()
  return (core_outcome(self))
end

--- Its number on the channel, counted from 1; of a publisher's message, its number there.
---@return integer
function methods:seq()
  local _, seq, number = core_outcome(self)
  return number or seq
end

--- Looks and does not wait: true once the broker has the message, false while it is not settled;
--- err.kind as for Confirmation:wait.
---@return boolean|nil, moonrabbit.Error?
function methods:poll()
  local acked = core_acked(self)
  if acked == nil then return nil, keeper(self):_failure(self) end
  return acked
end

return methods
