--- What becomes of messages, as lines of a log: an observer of an app.
--
-- | level | |
-- | --- | --- |
-- | `error` | a dead letter; a message that its handler settled before it failed |
-- | `warn` | a failure that is tried again |
-- | `debug` | every failed run with its traceback; duplicates, drops, messages that went back |
--
-- Each line has the queue, the message's id, the exchange and key that it was published with, its `traceparent`, and
-- the attempt. Bodies are never logged.
-- @module moonrabbit.life.journal

local copy = require "moonrabbit.app.copy"
local log_of = require("moonrabbit.log").of

local journal = {}

local function fields_of(queue, message, failure, more)
  local exchange, key = copy.origin(message)
  local fields = log_of(message, { queue = queue, exchange = exchange, routing_key = key })
  if failure then fields.kind, fields.attempt = failure.kind, failure.attempt end
  for name, value in pairs(more or {}) do fields[name] = value end
  return fields
end

-- outcome -> level, text; nil: no line.
local lines = {
  retry = function(delay, failure)
    return "warn", ("a message failed, and is tried again in %.3g s: %s"):format(delay, failure.message)
  end,
  dead_letter = function(reason, failure)
    return "error", "a dead letter: " .. (failure and failure.message or tostring(reason))
  end,
  drop = function(reason, failure)
    if failure then return "error", "a message is " .. tostring(reason) end
    return "debug", "a message was dropped"
  end,
  duplicate = function() return "debug", "a duplicate was acked" end,
  requeue = function(why) return "debug", "a message goes back to its queue: " .. tostring(why) end,
}

--- An observer that writes to a log, and passes on what it hears.
---@param log fun(level: string, text: string, fields: table?)
---@param also table another observer
---@return table
function journal.observer(log, also)
  local self = {}
  for name, fn in pairs(also) do self[name] = fn end
  self.guarded = nil -- its own functions are not yet

  function self.settled(queue, outcome, seconds, detail, message, failure)
    local line = lines[outcome]
    if line then
      local level, text = line(detail, failure)
      log(level, text, fields_of(queue, message, failure, outcome == "dead_letter" and { reason = detail } or nil))
    end
    if also.settled then also.settled(queue, outcome, seconds, detail, message, failure) end
  end

  function self.failed(queue, failure, message)
    log("debug", "a run failed: " .. failure.message,
      fields_of(queue, message, failure, { traceback = failure.traceback }))
    if also.failed then also.failed(queue, failure, message) end
  end

  return self
end

return journal
