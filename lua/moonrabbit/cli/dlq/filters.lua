--- Which dead letters a command is about: the options --error, --reason, --routing-key, --header, --died-in, --id, --older, --newer.

local values = require "moonrabbit.cli.values"

local filters = {}

local units = { s = 1, m = 60, h = 3600, d = 86400 }

--- "90", "90s", "10m", "2h", "1d" as seconds.
function filters.age(text)
  local number, unit = text:match "^(%d+%.?%d*)([smhd]?)$"
  if not number then return nil, ("'%s' is no age such as 90s, 10m, 2h or 1d"):format(text) end
  return tonumber(number) * (units[unit] or 1)
end

--- Adds the options to a command.
function filters.add_options(command)
  command:option "--error" :argname "<text>" :description "Only those whose error holds this text."
  command:option "--reason" :argname "<reason>"
    :description "Only those with this reason: attempts, permanent, expired, …"
  command:option "-k --routing-key" :argname "<pattern>" :convert(values.short)
    :description "Only those published with a routing key like this, as a topic: order.*.created, order.#"
  command:option "-H --header" :argname "<name=value>" :count "*" :convert(values.header)
    :description "Only those with this header; may be repeated. name:=JSON for other than strings."
  command:option "--died-in" :target "queue_filter" :argname "<queue>" :convert(values.short)
    :description "Only those that died in this queue."
  command:option "--id" :argname "<message-id>" :description "Only the one with this message id."
  command:option "--older" :argname "<age>" :convert(filters.age)
    :description "Only those dead for longer than 90s, 10m, 2h, 1d."
  command:option "--newer" :argname "<age>" :convert(filters.age) :description "Only those dead for less."
end

-- ---- Keys -------------------------------------------------------------------------------------------

local function words(text)
  local list = {}
  for word in (text .. "."):gmatch "(.-)%." do list[#list + 1] = word end
  return list
end

local function match_words(pattern, i, key, j)
  local word = pattern[i]
  if word == nil then return key[j] == nil end
  if word == "#" then
    for k = j, #key + 1 do
      if match_words(pattern, i + 1, key, k) then return true end
    end
    return false
  end
  if key[j] == nil then return false end
  return (word == "*" or word == key[j]) and match_words(pattern, i + 1, key, j + 1)
end

--- Whether a routing key fits a topic's pattern. Several "#" one after the other say no more than one.
function filters.key_matches(pattern, key)
  local wanted = {}
  for _, word in ipairs(words(pattern)) do
    if word ~= "#" or wanted[#wanted] ~= "#" then wanted[#wanted + 1] = word end
  end
  return match_words(wanted, 1, key == "" and {} or words(key), 1)
end

-- ---- Matching ---------------------------------------------------------------------------------------

local function headers_match(wanted, headers)
  for _, pair in ipairs(wanted or {}) do
    local value = headers[pair[1]]
    if value ~= pair[2] and (value == nil or tostring(value) ~= tostring(pair[2])) then return false end
  end
  return true
end

-- One that does not say when it died is neither older nor newer than anything.
local function age_matches(args, time, now)
  if not args.older and not args.newer then return true end
  if not time then return false end
  local age = now - time
  return (not args.older or age >= args.older) and (not args.newer or age <= args.newer)
end

--- Whether any filter was given.
function filters.any(args)
  return (args.error or args.reason or args.routing_key or args.queue_filter or args.id or args.older or args.newer
    or (args.header and #args.header > 0)) and true or false
end

--- Whether a dead letter is one of those that were asked for. now: seconds since 1970.
function filters.match(args, msg, letter, now)
  if args.error and not (letter.error and letter.error:find(args.error, 1, true)) then return false end
  if args.reason and letter.reason ~= args.reason then return false end
  if args.queue_filter and letter.queue ~= args.queue_filter then return false end
  if args.id and msg.properties.message_id ~= args.id then return false end
  local key = letter.routing_key or msg.routing_key
  if args.routing_key and not filters.key_matches(args.routing_key, key) then return false end
  return headers_match(args.header, msg.headers) and age_matches(args, letter.time, now)
end

return filters
