--- How long to wait before each attempt: `first`, then `factor` times as long each time up to `max`, each
-- with `jitter`, so that clients who lost the same broker do not come back all at once.
--
-- It starts again at `first` only once what was made has lasted for `stable` seconds: a broker that takes
-- connections and drops them at once is met with growing gaps.
-- @module moonrabbit.connection.backoff

local options = require "moonrabbit.options"
local chance = require "moonrabbit.random"

---@class moonrabbit.ReconnectOptions
---@field first number?     seconds before the first attempt; 0.1 by default
---@field factor number?    by which each wait is longer than the one before, at least 1; 2 by default
---@field max number?       seconds, the longest wait; 30 by default
---@field jitter number?    0 to 1: a wait of d seconds is somewhere between d * (1 - jitter) and d * (1 + jitter); 0.2 by default
---@field attempts number?  so many attempts without success, then it ends for good; math.huge by default
---@field stable number?    seconds that a connection must last before the waits start at `first` again; 5 by default
---@field initial boolean?  moonrabbit.connect itself keeps trying in the same way; false by default: it fails at once

local Backoff = {}
Backoff.__index = Backoff

local function jitter(value)
  if type(value) ~= "number" or not (value >= 0 and value <= 1) then return "a number from 0 to 1" end
end

local function attempts(value)
  if value ~= math.huge and options.integer(1, 9007199254740991)(value) then
    return "an integer, 1 or more, or math.huge"
  end
end

--- What a policy may say.
Backoff.options = {
  first = options.seconds, factor = options.number(1), max = options.seconds, jitter = jitter,
  attempts = attempts, stable = options.seconds, initial = options.boolean,
}

--- A new one.
---@param policy moonrabbit.ReconnectOptions  checked
---@param random (fun(): number)?  moonrabbit.random's by default
---@return table backoff
function Backoff.new(policy, random)
  return setmetatable({
    first = policy.first or 0.1, factor = policy.factor or 2, max = policy.max or 30,
    jitter = policy.jitter or 0.2, attempts = policy.attempts or math.huge, stable = policy.stable or 5,
    random = random or chance.number, attempt = 0,
  }, Backoff)
end

--- The wait before the next attempt, and its number; nil when there are no more.
---@return number? seconds, integer attempt
function Backoff:next()
  if self.attempt >= self.attempts then return nil, self.attempt end
  self.attempt = self.attempt + 1
  -- A power that overflows is math.huge, and min makes `max` of it; 0 stays 0.
  local delay = self.first == 0 and 0 or math.min(self.max, self.first * self.factor ^ (self.attempt - 1))
  return delay * (1 + self.jitter * (2 * self.random() - 1)), self.attempt
end

--- What the last attempts made has lasted for so long.
---@param seconds number
function Backoff:lasted(seconds)
  if seconds >= self.stable then self.attempt = 0 end
end

return Backoff
