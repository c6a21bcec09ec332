--- Copies of a message: what a retry, a dead letter or a replay leaves behind, moves and adds.
--
-- A copy is sent by Message:forward, so everything stays byte for byte that is not named here. What must not
-- stay, and where it goes (moonrabbit.app.headers):
--
-- * `x-death`, `x-first-death-*`, `x-last-death-*`: to `moonrabbit-deaths`. A broker before 4.0 takes an old
--   `x-death` for a cycle and drops the message when it next expires, though it has confirmed the copy.
-- * `expiration`: the wait would end early, and a dead letter expire.
-- * `CC`, `BCC`: every trip would deliver to those queues again.
-- * a `user_id` that is not the publishing connection's user: the broker closes the channel (406).
-- * a `reply_to` that is literally `amq.rabbitmq.reply-to`: so it does (406). What the broker made of it when the
--   message was first published, a longer name, stays.
-- * `x-delivery-count`: a quorum queue's own count, which would be taken for the next queue's.
--
-- Errors and tracebacks are cut to what is useful, and to less where a header frame has no room for them. A dead letter
-- tells nothing at all where there is no room for anything; a retry has to count.
-- @module moonrabbit.app.copy

local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local headers = require "moonrabbit.app.headers"
local deaths = require "moonrabbit.app.deaths"

local key_without = core.key_without

local copy = {}

local DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"

-- ---- Reading ----------------------------------------------------------------------------------------

-- A dead letter that was moved back by other means than a replay, a shovel say, begins anew as a replayed one does.
local function was_dead(all) return all[headers.dead_at] ~= nil end

--- Headers of a dead letter that a retry must not have.
copy.of_the_dead = { headers.reason, headers.traceback, headers.dead_at }

--- How many attempts at a message have failed, as it says.
---@param msg moonrabbit.Message
---@return integer
function copy.attempts(msg)
  local all = msg.headers
  return not was_dead(all) and headers.count(all, headers.attempts) or 0
end

--- When a message failed first: seconds since 1970, or nil when it never did.
---@param msg moonrabbit.Message
---@return number?
function copy.first_failure(msg)
  local all = msg.headers
  return not was_dead(all) and headers.time(all, headers.first_failure) or nil
end

--- Where a message was published to, whatever way it came: a retry comes from the ladder under its queue's name.
---@param msg moonrabbit.Message
---@return string exchange
---@return string routing_key
function copy.origin(msg)
  local all = msg.headers
  local exchange = headers.text(all, headers.exchange, 255)
  local key = headers.text(all, headers.routing_key, 255)
  if exchange and key then return exchange, key end
  return msg.exchange, msg.routing_key
end

--- The routing key that a message was published with. A copy has it in a header, which counts only where the message may
--- be one: it comes from a ladder's home, or straight to its queue, as a replay does.
---@param msg moonrabbit.Message
---@return string
function copy.routing_key(msg)
  local key = key_without(msg, headers.routing_key)
  if key then return key end
  local exchange = msg.exchange
  if exchange ~= nil and exchange ~= "" and exchange:sub(-5) ~= ".home" then return msg.routing_key end
  local all = msg.headers
  return all and headers.text(all, headers.routing_key, 255) or msg.routing_key
end

--- Names of the headers that tell of a message's life in this app, and mean nothing in another one's queue: the
--- broker's deaths and our own.
---@return string[]
function copy.private_headers()
  local list = { "CC", "BCC", "x-delivery-count" }
  for _, name in ipairs(deaths.names) do list[#list + 1] = name end
  for _, name in pairs(headers) do
    if type(name) == "string" then list[#list + 1] = name end
  end
  return list
end

-- ---- Sizes ------------------------------------------------------------------------------------------

-- How much of what a copy tells, by how little room there is: the least has what nothing can do without.
local sizes = {
  { error = 1024, traceback = 4096, reason = 512, deaths = 32 },
  { error = 200, traceback = 0, reason = 100, deaths = 1 },
  { error = 0, traceback = 0, reason = 0, deaths = 0 },
}
local SILENT = #sizes + 1 -- no notes

--- A text cut to `most` bytes, at a character's boundary, with a mark where it was cut; nil for none.
local function cut(text, most)
  if text == nil or most == 0 then return nil end
  text = tostring(text)
  if #text <= most then return text end
  local last = most - 3
  while last > 0 and text:byte(last + 1) >= 0x80 and text:byte(last + 1) < 0xC0 do last = last - 1 end
  return text:sub(1, last) .. "…"
end

-- ---- Edits ------------------------------------------------------------------------------------------

-- Moves what a copy must not have. edits = { set, remove, remove_properties }
local function move_headers(edits, all)
  for name, to in pairs { CC = headers.cc, BCC = headers.bcc } do
    if all[name] ~= nil then
      edits.set[to] = all[name]
      edits.remove[#edits.remove + 1] = name
    end
  end
  if all["x-delivery-count"] ~= nil then edits.remove[#edits.remove + 1] = "x-delivery-count" end
end

local function move_property(edits, name, value)
  edits.set[headers[name]] = value
  edits.remove_properties[#edits.remove_properties + 1] = name
end

local function move_properties(edits, properties, user)
  if properties.expiration ~= nil then move_property(edits, "expiration", properties.expiration) end
  if properties.user_id ~= nil and properties.user_id ~= user then
    move_property(edits, "user_id", properties.user_id)
  end
  if properties.reply_to == DIRECT_REPLY_TO then move_property(edits, "reply_to", properties.reply_to) end
end

local function move_deaths(edits, all, most, ladder)
  local moved, any = deaths.merge(all[headers.deaths], all, most, ladder)
  if not any then return end
  for _, name in ipairs(deaths.names) do
    if all[name] ~= nil then edits.remove[#edits.remove + 1] = name end
  end
  if moved then edits.set[headers.deaths] = moved
  elseif all[headers.deaths] ~= nil then edits.remove[#edits.remove + 1] = headers.deaths end
end

-- What the copy tells, shortened to `size`.
local function add_notes(set, notes, size)
  for name, value in pairs(notes) do
    local most = size[name]
    if most then value = cut(value, most) end
    if value ~= nil then set[headers[name]] = value end
  end
end

---@class moonrabbit.CopyOptions
---@field channel moonrabbit.Channel  with confirms, of the connection that publishes
---@field notes table                 what the copy tells: { attempts = 2, error = "…" }, by the names of moonrabbit.app.headers
---@field remove string[]?            headers to leave out
---@field set table<string, any>?     headers to set, as they are
---@field ladder string?              the ladder whose own deaths are not worth keeping
---@field silent boolean?             where there is no room for notes it goes without them
---@field timeout number?             seconds to wait for the confirm; the channel's by default

--- What to change in a copy, as Message:forward takes it. `size`: 1 (everything) to 3 (the least), 4: nothing is told.
---@package
function copy.edits(msg, opts, user, size)
  local edits = { set = {}, remove = {}, remove_properties = {} }
  local all, silent = msg.headers, size == SILENT
  size = sizes[math.min(size, #sizes)]
  for _, name in ipairs(opts.remove or {}) do
    if all[name] ~= nil then edits.remove[#edits.remove + 1] = name end
  end
  move_headers(edits, all)
  move_properties(edits, msg.properties, user)
  move_deaths(edits, all, size.deaths, opts.ladder)
  if silent then edits.set = {} else add_notes(edits.set, opts.notes, size) end
  for name, value in pairs(opts.set or {}) do edits.set[name] = value end
  return edits
end

--- The user of a channel's connection, as far as the client knows it.
local function user_of(channel)
  local target = channel.connection and channel.connection._target
  if not target or target.mechanism == "EXTERNAL" then return nil end
  return target.user
end

--- Sends a copy and waits for its confirm: true once the broker has it in a queue. err.kind is as for
--- Message:forward; `overflow` with err.temporary false: the message's own headers leave no room.
---@param msg moonrabbit.Message
---@param exchange string
---@param routing_key string
---@param opts moonrabbit.CopyOptions
---@return true|nil, moonrabbit.Error?
function copy.send(msg, exchange, routing_key, opts)
  local channel = opts.channel
  local user = user_of(channel)
  local ok, err
  for size = 1, opts.silent and SILENT or #sizes do
    local edits = copy.edits(msg, opts, user, size)
    edits.channel, edits.timeout, edits.mandatory = channel, opts.timeout, true
    ok, err = msg:forward(exchange, routing_key, edits)
    if ok or err.kind ~= "overflow" or err.temporary then return ok, err end
  end
  return nil, errors.new { kind = "overflow", temporary = false, code = err.code,
    message = "the message's own headers leave no room for those of a copy: " .. err.message }
end

--- The headers of a copy that tell of a failure. `attempt`: the one that failed; `at`: seconds since 1970.
---@param msg moonrabbit.Message
---@param failure moonrabbit.RetryFailure
---@param attempt integer
---@param queue string whose consumer failed
---@param at integer
---@return table notes
function copy.notes(msg, failure, attempt, queue, at)
  local exchange, key = copy.origin(msg)
  return {
    attempts = attempt, error = failure.message or "failed", error_kind = failure.kind, queue = queue,
    exchange = exchange, routing_key = key,
    first_failure = core.types.timestamp(math.floor(copy.first_failure(msg) or at - (failure.since or 0))),
    last_failure = core.types.timestamp(math.floor(at)),
  }
end

return copy
