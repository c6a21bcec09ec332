--- Checks options tables: unknown names and wrong types throw, naming the option and what is valid.
-- @module moonrabbit.options

local options = {}

local type, tostring, pairs = type, tostring, pairs
local floor, huge = math.floor, math.huge

-- ---- Kinds of values. Each is a function (value) -> nil when it fits, else what was expected. -------

local function plain(name, article)
  return function(value)
    if type(value) ~= name then return article .. " " .. name end
  end
end

options.string = plain("string", "a")
options.boolean = plain("boolean", "a")
options.table = plain("table", "a")
options["function"] = plain("function", "a")
options.callback = options["function"]

function options.any() end

--- A short string of AMQP: at most 255 bytes.
function options.shortstr(value)
  if type(value) ~= "string" then return "a string" end
  if #value > 255 then return "a string of at most 255 bytes (these are " .. #value .. ")" end
end

--- A number of seconds, 0 or more; math.huge: for ever.
function options.seconds(value)
  if type(value) ~= "number" or value ~= value or value < 0 then return "a number of seconds, 0 or more" end
end

--- An integer from min to max (a float that is one will do).
function options.integer(min, max)
  return function(value)
    if type(value) ~= "number" or value ~= floor(value) or value < min or value > max or value == huge then
      return ("an integer from %.0f to %.0f"):format(min, max)
    end
  end
end

function options.number(min)
  return function(value)
    if type(value) ~= "number" or value ~= value or value < min then return "a number, " .. min .. " or more" end
  end
end

function options.one_of(...)
  local list = { ... }
  local set = {}
  for _, name in ipairs(list) do set[name] = true end
  return function(value)
    if not set[value] then return '"' .. table.concat(list, '" or "') .. '"' end
  end
end

--- Any of several kinds.
function options.either(...)
  local kinds = { ... }
  return function(value)
    local expected = {}
    for i, kind in ipairs(kinds) do
      expected[i] = kind(value)
      if not expected[i] then return nil end
    end
    return table.concat(expected, " or ")
  end
end

-- ---- The nearest valid name -------------------------------------------------------------------------

-- Edits between two words, counting a swap of neighbours as one; gives up past `limit`.
local function distance(a, b, limit)
  if math.abs(#a - #b) > limit then return limit + 1 end
  local before, previous, current = {}, {}, {}
  for j = 0, #b do previous[j] = j end
  for i = 1, #a do
    current[0] = i
    local x = a:byte(i)
    for j = 1, #b do
      local y = b:byte(j)
      local cost = x == y and 0 or 1
      local best = math.min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + cost)
      if i > 1 and j > 1 and x == b:byte(j - 1) and a:byte(i - 1) == y then
        best = math.min(best, before[j - 2] + 1)
      end
      current[j] = best
    end
    before, previous, current = previous, current, before
  end
  return previous[#b]
end

--- The name in `valid` that looks most like `key`, or nil when none does.
---@param key string
---@param valid table<string, any>
---@return string?
function options.nearest(key, valid)
  if #key > 64 then return nil end
  local limit = math.max(1, floor(#key / 3))
  local best, best_distance
  for name in pairs(valid) do
    if type(name) == "string" then
      local d = distance(key:lower(), name, limit)
      if d <= limit and (not best or d < best_distance or (d == best_distance and name < best)) then
        best, best_distance = name, d
      end
    end
  end
  return best
end

local function names(valid)
  local list = {}
  for name in pairs(valid) do list[#list + 1] = tostring(name) end
  table.sort(list)
  return table.concat(list, ", ")
end

-- ---- Checking ---------------------------------------------------------------------------------------

local empty = setmetatable({}, { __newindex = function() error("read only", 2) end })

--- Throws unless `given` is nil or a table whose every key is in `valid` and of its kind.
---@param what string        the function, for the message: "Channel:consume"
---@param given table?
---@param valid table<string, function>
---@param level integer?     as in error(); 2 (default): the caller of the function that calls this
---@return table
function options.check(what, given, valid, level)
  level = (level or 2) + 1
  if given == nil then return empty end
  if type(given) ~= "table" then
    error(what .. ": options must be a table, not a " .. type(given), level)
  end
  for key, value in pairs(given) do
    local kind = valid[key]
    if not kind then
      local hint = type(key) == "string" and options.nearest(key, valid)
      error(what .. ": unknown option " .. (type(key) == "string" and "'" .. key:sub(1, 64) .. "'" or tostring(key))
        .. (hint and " (did you mean '" .. hint .. "'?)" or " (valid: " .. names(valid) .. ")"), level)
    end
    local expected = kind(value)
    if expected then
      error(what .. ": option '" .. key .. "' must be " .. expected .. ", not "
        .. (type(value) == "number" and tostring(value) or "a " .. type(value)), level)
    end
  end
  return given
end

--- How many places a list has, those before a gap and behind it; other keys do not count.
---@param list table
---@return integer count
---@return integer others how many other keys it has
function options.places(list)
  local count, others = 0, 0
  for key in pairs(list) do
    if type(key) == "number" then count = count + 1 else others = others + 1 end
  end
  return count, others
end

--- Whether a value is a list without gaps and other keys.
---@param value any
---@return boolean
function options.is_list(value)
  if type(value) ~= "table" then return false end
  local count, others = options.places(value)
  for i = 1, count do
    if value[i] == nil then return false end
  end
  return others == 0
end

--- A kind: a list, without gaps, whose every entry is of a kind.
---@param kind function
---@param what string     "a list of URIs"
---@param least integer?  entries
---@return function
function options.list_of(kind, what, least)
  return function(value)
    if not options.is_list(value) or #value < (least or 0) then return what end
    for i = 1, #value do
      if kind(value[i]) then return what end
    end
  end
end

--- Throws unless an argument is of a kind.
---@param what string
---@param name string
---@param value any
---@param kind function
---@param level integer?
function options.argument(what, name, value, kind, level)
  local expected = kind(value)
  if expected then
    error(what .. ": " .. name .. " must be " .. expected .. ", not "
      .. (type(value) == "number" and tostring(value) or "a " .. type(value)), (level or 2) + 1)
  end
  return value
end

--- A schema with the entries of several.
function options.merge(...)
  local all = {}
  for _, schema in ipairs { ... } do
    for name, kind in pairs(schema) do all[name] = kind end
  end
  return all
end

--- What a publish takes, wherever it is given: the route, and the properties of
-- https://www.rabbitmq.com/docs/publishers#message-properties.
options.publish = {
  exchange = options.shortstr,
  routing_key = options.shortstr,
  mandatory = options.boolean,
  persistent = options.boolean,
  content_type = options.shortstr,
  content_encoding = options.shortstr,
  headers = options.table,
  delivery_mode = options.integer(1, 2),
  priority = options.integer(0, 255),
  correlation_id = options.shortstr,
  reply_to = options.shortstr,
  expiration = options.either(options.shortstr, options.number(0)),
  message_id = options.shortstr,
  timestamp = options.any,
  type = options.shortstr,
  user_id = options.shortstr,
  app_id = options.shortstr,
  cluster_id = options.shortstr,
}

return options
