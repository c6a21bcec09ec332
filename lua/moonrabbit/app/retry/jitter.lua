--- Jitter: spreads the retries of messages that failed together.
-- @module moonrabbit.app.retry.jitter

local jitter = {}

--- What is wrong with a value of the option `jitter`, or nil.
function jitter.valid(value)
  if value == "full" or value == "equal" or value == "none" then return end
  if type(value) == "number" and value >= 0 and value <= 1 then return end
  return '"full", "equal", "none" or a number from 0 to 1'
end

--- The least and the most that a delay can become.
function jitter.range(kind, delay)
  if kind == "full" then return 0, delay end
  if kind == "equal" then return delay / 2, delay end
  local share = kind == "none" and 0 or kind
  return delay * (1 - share), delay * (1 + share)
end

--- A delay with jitter.
function jitter.apply(kind, delay, random)
  if kind == "none" then return delay end
  local low, high = jitter.range(kind, delay)
  return low + (high - low) * random()
end

return jitter
