--- What a handler may return besides nothing, `true` or `nil, err`; and the error that no retry helps against.
--
--     return mr.outcome.retry(30)                  -- again in 30 s, whatever the policy says
--     return mr.outcome.dead_letter "no such user" -- parked, with this reason
--     return mr.outcome.drop()                     -- acked and forgotten, on purpose
--     error(mr.permanent "no such user")           -- a failure that goes to the dead letters at once
--
-- @module moonrabbit.app.outcome

local options = require "moonrabbit.options"
local steps = require "moonrabbit.app.steps"

---@class moonrabbit.Outcome
---@field action "retry"|"dead_letter"|"drop"
---@field after number?   of retry: seconds; nil: what the policy says
---@field reason string?  of dead_letter
local Outcome = {}
Outcome.__index = Outcome
Outcome.__name = "moonrabbit.Outcome"

function Outcome.__tostring(self)
  if self.action == "retry" then
    return "retry" .. (self.after and (" after %g s"):format(self.after) or "")
  elseif self.action == "dead_letter" then
    return "dead_letter: " .. self.reason
  end
  return self.action
end

---@class moonrabbit.Permanent
---@field message string
---@field value any        what was given as the reason
local Permanent = {}
Permanent.__index = Permanent
Permanent.__name = "moonrabbit.Permanent"

function Permanent.__tostring(self) return self.message end

local outcome = { Outcome = Outcome, Permanent = Permanent }

--- Handles the message again later. It counts as a failed attempt.
---@param after number? seconds, at most 4,000,000, however often that was asked before; by default the retry policy decides
---@return moonrabbit.Outcome
function outcome.retry(after)
  if after ~= nil then
    options.argument("outcome.retry", "after", after, options.seconds)
    if after > steps.LONGEST then
      error(("outcome.retry: after must be at most %d s, what a wait queue can hold"):format(steps.LONGEST), 2)
    end
  end
  return setmetatable({ action = "retry", after = after }, Outcome)
end

--- Parks the message in the dead-letter queue of its consumer.
---@param reason string? for people; travels with the message
---@return moonrabbit.Outcome
function outcome.dead_letter(reason)
  if reason ~= nil then options.argument("outcome.dead_letter", "reason", reason, options.string) end
  return setmetatable({ action = "dead_letter", reason = reason or "the handler said so" }, Outcome)
end

local drop = setmetatable({ action = "drop" }, Outcome)

--- Acks the message although nobody handled it.
---@return moonrabbit.Outcome
function outcome.drop()
  return drop
end

--- An error to throw, or to return after nil: trying again cannot help.
---@param reason any what went wrong
---@return moonrabbit.Permanent
function outcome.permanent(reason)
  return setmetatable({ message = tostring(reason), value = reason }, Permanent)
end

return outcome
