--- Dead letters: the queue where they are parked, and what they tell.
--
-- A dead letter of an app carries the headers of moonrabbit.app.headers. One that the broker made (rejected, expired,
-- over a length or delivery limit) carries the broker's `x-death` and the like; both are read here. So are a ladder's
-- orphans, whose last death in a wait queue tells nothing: they come from the app, with the reason "orphaned".
-- @module moonrabbit.app.dead_letter

local headers = require "moonrabbit.app.headers"
local copy = require "moonrabbit.app.copy"
local ladder = require "moonrabbit.app.ladder"
local own_channel = require "moonrabbit.app.own_channel"

local dead_letter = {}

-- ---- Parking ----------------------------------------------------------------------------------------

--- The queue as a plan has it: durable, a quorum queue.
---@param queue string
---@param version string? the broker's
---@return { name: string, durable: boolean, arguments: table }
function dead_letter.entity(queue, version)
  return { name = queue, durable = true, arguments = ladder.parking_arguments(version or "4.0") }
end

local function try(connection, queue, opts)
  return own_channel(connection, function(channel) return channel:queue_declare(queue, opts) end)
end

--- Sees to it that a parking queue is there. One that exists with other properties, or that this user may not declare,
--- is used as it is.
---@param connection moonrabbit.Connection
---@param queue string
---@param log fun(level: string, text: string)
---@return true|nil, moonrabbit.Error?
function dead_letter.declare(connection, queue, log)
  local server = connection:server()
  local entity = dead_letter.entity(queue, server and server.version)
  local ok, err = try(connection, queue, { durable = true, arguments = entity.arguments })
  if ok then return true end
  if err.code ~= 406 and err.code ~= 403 then return nil, err end
  if not try(connection, queue, { passive = true }) then return nil, err end
  log("info", ("the dead-letter queue '%s' is used as it is: %s"):format(queue, err.message))
  return true
end

-- ---- Reading ----------------------------------------------------------------------------------------

---@class moonrabbit.DeadLetter
---@field by "app"|"broker"|"unknown"   who made it
---@field reason string?
---@field error string?
---@field error_kind string?
---@field traceback string?
---@field attempts integer?
---@field first_failure number?  seconds since 1970
---@field time number?           seconds since 1970: when it became a dead letter
---@field exchange string?       where it was published to
---@field routing_key string?
---@field queue string?          where it died
---@field app string?
---@field replays integer        how often it was replayed

local function of_app(all, text)
  return {
    by = "app", reason = text "reason", error = text "error", error_kind = text "error_kind",
    traceback = text "traceback", app = text "app", queue = text "queue", exchange = text "exchange",
    routing_key = text "routing_key", attempts = headers.count(all, headers.attempts),
    first_failure = headers.time(all, headers.first_failure),
    time = headers.time(all, headers.dead_at) or headers.time(all, headers.last_failure),
  }
end

local function string_or_nil(value) return type(value) == "string" and value or nil end

-- The entry of x-death that tells of the last death.
local function last_death(all)
  local list = all["x-death"]
  local entry = type(list) == "table" and list[1]
  return type(entry) == "table" and entry or nil
end

-- A retry that found no home.
local function is_orphan(all)
  local entry = last_death(all)
  return entry ~= nil and all[headers.queue] ~= nil and type(entry.queue) == "string"
    and entry.queue:find "%.wait%.%d+m?s$" ~= nil
end

local function of_broker(all, text)
  local entry = last_death(all)
  local keys = entry["routing-keys"]
  return {
    by = "broker", reason = string_or_nil(entry.reason), queue = string_or_nil(entry.queue),
    -- What an earlier trip of our own noted is where the message came from first.
    exchange = text "exchange" or string_or_nil(entry.exchange),
    routing_key = text "routing_key" or (type(keys) == "table" and string_or_nil(keys[1]) or nil),
    time = headers.time(entry, "time"), attempts = headers.count(all, headers.attempts),
    error = text "error", error_kind = text "error_kind", first_failure = headers.time(all, headers.first_failure),
  }
end

--- What a dead letter tells.
---@param msg moonrabbit.Message
---@return moonrabbit.DeadLetter
function dead_letter.read(msg)
  local all = msg.headers
  local function text(name) return headers.text(all, headers[name]) end
  local letter
  if all[headers.reason] ~= nil or (all[headers.queue] ~= nil and not last_death(all)) then
    letter = of_app(all, text)
  elseif is_orphan(all) then
    letter = of_app(all, text)
    letter.reason = "orphaned"
  elseif last_death(all) then
    letter = of_broker(all, text)
  else
    letter = { by = "unknown", exchange = msg.exchange, routing_key = msg.routing_key }
  end
  letter.replays = headers.count(all, headers.replays) or 0
  return letter
end

-- ---- Replaying --------------------------------------------------------------------------------------

-- What told of the failure; the message begins anew.
local told = { "attempts", "first_failure", "last_failure", "error", "error_kind", "traceback", "reason", "dead_at" }

--- Where a replay goes: to the queue where the message died, or with `republish` to where it was published.
---@param letter moonrabbit.DeadLetter
---@param republish boolean?
---@return string|nil exchange nil: the dead letter does not tell
---@return string? routing_key
function dead_letter.destination(letter, republish)
  if republish then
    if letter.exchange and letter.routing_key then return letter.exchange, letter.routing_key end
    return nil
  end
  if letter.queue then return "", letter.queue end
  return nil
end

-- The headers that were moved aside and that the whole route may have again.
local function restored(all)
  local set, remove = {}, {}
  for name, kept in pairs { CC = headers.cc, BCC = headers.bcc } do
    if all[kept] ~= nil then
      set[name] = all[kept]
      remove[#remove + 1] = kept
    end
  end
  return set, remove
end

---@class moonrabbit.ReplayOptions
---@field channel moonrabbit.Channel  with confirms
---@field exchange string
---@field routing_key string
---@field republish boolean?  it goes the whole way again: CC and BCC count again
---@field timeout number?

--- Sends a dead letter on its way again and waits for the confirm. It is not acked by this.
--- Attempts and the failure are left out; where it was published and what the broker noted stay; `moonrabbit-replays`
--- counts.
---@param msg moonrabbit.Message
---@param letter moonrabbit.DeadLetter
---@param opts moonrabbit.ReplayOptions
---@return true|nil, moonrabbit.Error?
function dead_letter.replay(msg, letter, opts)
  local all = msg.headers
  local set, remove = {}, {}
  if opts.republish then set, remove = restored(all) end
  for _, name in ipairs(told) do remove[#remove + 1] = headers[name] end
  return copy.send(msg, opts.exchange, opts.routing_key, {
    channel = opts.channel, timeout = opts.timeout, set = set, remove = remove,
    notes = {
      replays = letter.replays + 1,
      exchange = letter.exchange, routing_key = letter.routing_key,
    },
  })
end

return dead_letter
