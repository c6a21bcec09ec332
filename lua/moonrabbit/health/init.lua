--- Health: when the broker's silence ends the connection.
--
-- Without the option `health` one rule holds, kept by the core at no cost: nothing heard for two
-- heartbeat intervals. It always holds; a strategy can only be quicker. Three of them:
--
-- * `fixed`: nothing heard for `multiple` intervals.
-- * `adaptive`: a sliding window over what this connection has been like. When nothing was heard for `probe`
--   seconds the broker is asked something (basic.qos on a channel of our own, which any broker answers without
--   looking at a queue). An answer that takes longer than the mean of the last `window` round trips and
--   `deviations` of their standard deviations, and no less than `least`, is suspicious. Where nothing can be
--   asked, the same is done with the gaps between frames, and no gap below one interval is suspicious.
-- * `consecutive`: `misses` periods of `probe` seconds in a row in which nothing came though the broker was asked.
--
-- Mean and deviations are those of the accrual detector of Hayashibara et al. ("The φ accrual failure detector",
-- SRDS 2004) with its normal distribution: 6 deviations are φ = 9, a wrong suspicion in 10^9 answers if they
-- were distributed like that; `least` is for the pauses that never are. Only silence that follows a
-- question is judged so strictly: gaps of a busy connection say nothing about a quiet one.
--
-- Whatever comes from the broker is an answer. Nothing is held against it while this process stood still (the
-- loop was away, the process was stopped), while reading is paused, or while the broker has blocked us (it
-- does not read probes then, but goes on sending heartbeats).
--
--     moonrabbit.connect { uri = …, heartbeat = 10, health = "adaptive" }
--     moonrabbit.connect { uri = …, heartbeat = 10, health = { strategy = "consecutive", probe = 2, misses = 3 } }
--
-- A suspicion is the event "suspect" (strategy, details), and ends the session with err.kind `timeout`,
-- err.strategy and err.temporary = true. Costs: a function call a read, and a wake-up each `probe` seconds.
-- @module moonrabbit.health

local options = require "moonrabbit.options"
local Detector = require "moonrabbit.health.detector"

---@class moonrabbit.HealthOptions
---@field strategy ("fixed"|"adaptive"|"consecutive")?  "adaptive" by default
---@field multiple number?     (fixed) heartbeat intervals of silence, 1 to 2; 2 by default
---@field probe (number|false)?  seconds of silence after which the broker is asked, and of a period of `consecutive`; a quarter of the heartbeat interval by default, false: never; for `fixed` false by default
---@field window integer?      (adaptive) round trips and gaps that are remembered, 2 to 10000; 100 by default
---@field deviations number?   (adaptive) how far from the mean an answer may be; 6 by default
---@field least number?        (adaptive) seconds that an answer may always take; a quarter of the heartbeat interval, but at least 1 by default
---@field misses integer?      (consecutive) how many periods in a row; 3 by default

local health = {}

local function positive(value)
  if type(value) ~= "number" or not (value > 0 and value < math.huge) then return "a number of seconds above 0" end
end

local function between(least, most)
  return function(value)
    if type(value) ~= "number" or not (value >= least and value <= most) then
      return ("a number from %g to %g"):format(least, most)
    end
  end
end

local function off(value)
  if value ~= false then return "false" end
end

local name = options.one_of("fixed", "adaptive", "consecutive")

local valid = {
  strategy = name, multiple = between(1, 2), probe = options.either(positive, off), window = options.integer(2, 10000),
  deviations = between(1, 1000), least = positive, misses = options.integer(1, 1000),
}

-- What belongs to one strategy only.
local owner = {
  multiple = "fixed", window = "adaptive", deviations = "adaptive", least = "adaptive", misses = "consecutive",
}

--- The option `health` as a table; throws for a wrong one.
---@param what string      for the message
---@param given true|string|moonrabbit.HealthOptions true: the defaults
---@param heartbeat integer that is asked for, in seconds
---@param level integer?   of the caller
---@return moonrabbit.HealthOptions
function health.checked(what, given, heartbeat, level)
  level = (level or 1) + 1
  if given == true then
    given = {}
  elseif type(given) == "string" then
    options.argument(what, "option 'health'", given, name, level)
    given = { strategy = given }
  else
    options.check(what .. ": health", given, valid, level)
  end
  local strategy = given.strategy or "adaptive"
  for key, of in pairs(owner) do
    if given[key] ~= nil and of ~= strategy then
      error(("%s: health: '%s' belongs to the strategy '%s', not to '%s'"):format(what, key, of, strategy), level)
    end
  end
  if heartbeat == 0 then
    if strategy == "fixed" then
      error(what .. ": health: 'fixed' counts heartbeat intervals, and heartbeats are off", level)
    elseif not given.probe then
      error(what .. ": health: heartbeats are off, so 'probe' must say how often the broker is asked", level)
    end
  end
  return given
end

--- A detector of one session. It reads no clock: every function takes `now`.
---@param opts moonrabbit.HealthOptions as `checked` returned it
---@param heartbeat integer the interval that was agreed on, in seconds; 0: none
---@param now number
---@return moonrabbit.health.Detector
function health.new(opts, heartbeat, now)
  return Detector.new(opts, heartbeat, now)
end

return health
