--- Logs of one line each, for people or as JSON; for the option `log` of connect and mr.app.
--
--     local log = moonrabbit.log.new { format = "json", level = "info" }
--     moonrabbit.connect { uri = "amqp://", log = log }
--     log("info", "order taken", moonrabbit.log.of(msg, { order = 17 }))
--
-- Secrets that are known (moonrabbit.secret), passwords in URIs, and what follows words such as `password=` or `Bearer`, are replaced by "***", and fields of
-- such names too. No text can begin a line of its own: control characters are escaped.
-- @module moonrabbit.log

local described = require "moonrabbit.described"
local json = require "moonrabbit.cli.json"
local options = require "moonrabbit.options"
local secret = require "moonrabbit.secret"
local trace = require "moonrabbit.trace"

local log = {}

local ranks = { debug = 1, info = 2, warn = 3, error = 4 }

-- ---- Redaction --------------------------------------------------------------------------------------

local secret_words = { "password", "passwd", "secret", "token", "authorization", "api_key", "apikey" }

local function is_secret(name)
  name = tostring(name):lower()
  for _, word in ipairs(secret_words) do
    if name:find(word, 1, true) then return true end
  end
  return false
end

-- Where a value between quotes ends, which may be escaped themselves; the text's end where nothing closes it.
local function quoted_end(text, quote, at)
  if #quote == 2 then return (text:find(quote, at, true) or #text + 1) - 1 end
  local stop = text:find("[\\" .. quote .. "]", at)
  while stop and text:sub(stop, stop) == "\\" do stop = text:find("[\\" .. quote .. "]", stop + 2) end
  return (stop or #text + 1) - 1
end

-- Where a value begins and ends; nil where there is none.
local function value_at(text, at)
  local quote = text:match("^\\?[\"']", at)
  if quote then return at + #quote, quoted_end(text, quote, at + #quote) end
  local _, last = text:find("^[^%s,;&]+", at)
  return last and at, last
end

-- None of these patterns may begin at every letter of a long word: that takes the square of its length.

-- What stands between "//" and the last "@" of "scheme://user:password@host".
local function redact_authority(authority)
  local first, at = authority:match "[:@]", authority:match "^.*()@"
  if first == ":" and at then return "//***" .. authority:sub(at) end
end

-- "password = x", "token: x", `"secret":"x"`: the value goes. What follows any other word may be a pair itself: "it said
-- no: token=x".
local function redact_pairs(text)
  local out, at = {}, 1
  while true do
    local from, to, word = text:find("%f[%w_%-]([%w_%-]+)[\\\"']*%s*[=:]%s*", at)
    if not from then break end
    out[#out + 1] = text:sub(at, to)
    at = to + 1
    local first, last
    if is_secret(word) then first, last = value_at(text, at) end
    if first then
      out[#out + 1] = text:sub(at, first - 1) .. "***"
      at = last + 1
    end
  end
  out[#out + 1] = text:sub(at)
  return table.concat(out)
end

--- A text without the secrets that are known, and without what looks like a password.
---@param text string
---@return string
function log.redact(text)
  text = secret.blot(text)
  text = text:gsub("//([^/%s]+)", redact_authority) -- without its ":", which ends the authority before it: "a://h,b://u:p@h"
  text = text:gsub("([Bb]earer%s+)[%w%-._~+/=]+", "%1***")
  text = text:gsub("([Bb]asic%s+)[%w+/]+=*", function(word) return word .. "***" end)
  return redact_pairs(text)
end

-- Tables are taken apart so deep, and no deeper: a field may hold itself.
local DEEPEST = 4

local function redact_value(name, value, depth)
  if is_secret(name) then return "***" end
  if type(value) == "string" then return log.redact(value) end
  if type(value) ~= "table" then return value end
  local meta = getmetatable(value)
  if meta and meta.__tostring or depth >= DEEPEST then return log.redact(described(value)) end
  local all = {}
  for key, each in pairs(value) do all[key] = redact_value(key, each, depth + 1) end
  return all
end

-- ---- Formats ----------------------------------------------------------------------------------------

local function stamp(time) return os.date("!%Y-%m-%dT%H:%M:%SZ", time) end

local function escape(text)
  return (text:gsub("%c", function(c)
    return c == "\n" and "\\n" or c == "\t" and "\\t" or ("\\x%02x"):format(c:byte())
  end))
end

local function sorted(fields)
  local names = {}
  for name in pairs(fields) do names[#names + 1] = name end
  table.sort(names, function(a, b) return tostring(a) < tostring(b) end)
  return names
end

local function plain_value(value)
  local text = type(value) == "table" and json.encode(value) or tostring(value)
  if text == "" or text:find '[%s"=]' then return '"' .. escape(text:gsub('[\\"]', "\\%0")) .. '"' end
  return escape(text)
end

local formats = {}

function formats.line(time, level, text, fields)
  local parts = { stamp(time), ("%-5s"):format(level), escape(text) }
  for _, name in ipairs(sorted(fields)) do
    parts[#parts + 1] = escape(tostring(name)) .. "=" .. plain_value(fields[name])
  end
  return table.concat(parts, " ") .. "\n"
end

function formats.json(time, level, text, fields)
  local all = {}
  for name, value in pairs(fields) do all[tostring(name)] = value end
  all.time, all.level, all.message = stamp(time), level, text
  return json.encode(all) .. "\n"
end

-- ---- Logs -------------------------------------------------------------------------------------------

---@class moonrabbit.LogOptions
---@field level ("debug"|"info"|"warn"|"error")?  what is less is left out; "info" by default
---@field format ("line"|"json")?  "line" by default
---@field fields table?            in every line, such as the name of the service
---@field write (fun(line: string))?  where lines go; stderr by default
---@field now (fun(): number)?     seconds since 1970; os.time by default

--- A log: a function (level, text, fields).
---@param opts moonrabbit.LogOptions?
---@return fun(level: string, text: string, fields: table?)
function log.new(opts)
  opts = options.check("log.new", opts, {
    level = options.one_of("debug", "info", "warn", "error"), format = options.one_of("line", "json"),
    fields = options.table, write = options.callback, now = options.callback,
  })
  local least, format = ranks[opts.level or "info"], formats[opts.format or "line"]
  local write = opts.write or function(line) io.stderr:write(line) end
  local now, common = opts.now or os.time, opts.fields or {}
  return function(level, text, fields)
    if (ranks[level] or ranks.error) < least then return end
    local all = {}
    for name, value in pairs(common) do all[name] = redact_value(name, value, 0) end
    for name, value in pairs(fields or {}) do all[name] = redact_value(name, value, 0) end
    write(format(now(), level, log.redact(described(text)), all))
  end
end

--- Fields that tell which message a line is about: its id, where it came from, and its `traceparent`.
---@param message moonrabbit.Message
---@param fields table? added to them
---@return table
function log.of(message, fields)
  local all = {
    message_id = message.properties.message_id, exchange = message.exchange, routing_key = message.routing_key,
    traceparent = trace.parse(message.headers.traceparent) and message.headers.traceparent or nil,
  }
  for name, value in pairs(fields or {}) do all[name] = value end
  return all
end

return log
