--- Secrets: passwords, tokens and keys, from where they are kept; and out of everything that is written.
--
--     mr.app {
--       connect = { uri = "amqps://orders@rabbit.example/", password = mr.secret.file "/run/secrets/rabbitmq" },
--       …
--
-- A secret is a function: it answers the value, or nil and why there is none. Wherever a `password` may be a function
-- (connections, the management API, Redis) it is asked anew each time one connects, so a file or a vault that has a new
-- password is enough to rotate it. In a handler of yours: `local key = assert(api_key())`. Printing one shows no value,
-- and a value that was asked for is blotted out of every log.
--
-- `moonrabbit run` and `--check` ask for those of the script before anything is connected.
-- @module moonrabbit.secret

local protect = require "moonrabbit.protect"

local secret = {}

-- A file beyond this is no secret.
local LARGEST = 65536

-- function -> true
local ours = setmetatable({}, { __mode = "k" })

-- Shorter ones would take everyday words along; and a password that changes each minute must not fill the memory.
local SHORTEST, MOST = 4, 100

local known = {}

local function percent_encoded(text)
  return (text:gsub("[^%w%-%._~]", function(c) return ("%%%02X"):format(c:byte()) end))
end

--- Remembers a secret: from now on no log and no complaint shows it.
---@param text string?
function secret.remember(text)
  if type(text) ~= "string" or #text < SHORTEST then return end
  for i, each in ipairs(known) do
    if each.plain == text then
      table.remove(known, i)
      break
    end
  end
  if #known >= MOST then table.remove(known, 1) end
  known[#known + 1] = { plain = text, encoded = percent_encoded(text) }
end

--- A text without something in it, wherever that stands.
---@package
---@param text string
---@param what string
---@return string
function secret.without(text, what)
  local from, to = text:find(what, 1, true)
  while from do
    text = text:sub(1, from - 1) .. "***" .. text:sub(to + 1)
    from, to = text:find(what, from + 3, true)
  end
  return text
end

--- A text without the secrets that are known.
---@param text string
---@return string
function secret.blot(text)
  for i = #known, 1, -1 do
    text = secret.without(text, known[i].plain)
    if known[i].encoded ~= known[i].plain then text = secret.without(text, known[i].encoded) end
  end
  return text
end

-- ---- Sources ----------------------------------------------------------------------------------------

local function make(read)
  local function ask()
    local value, why = read()
    if value == nil then return nil, why end
    secret.remember(value)
    return value
  end
  ours[ask] = true
  return ask
end

local function text_or_why(value, what)
  if value == nil then return nil, what .. " is not set" end
  if value == "" then return nil, what .. " is empty" end
  return value
end

local function argument(what, value)
  if type(value) ~= "string" or value == "" then
    error(("%s expected, not %s"):format(what, value == "" and "nothing" or "a " .. type(value)), 3)
  end
end

--- The value of an environment variable; nil, and why there is none.
---@package
function secret.read_env(name) return text_or_why(os.getenv(name), "the environment variable " .. name) end

--- The contents of a file without the line's end at its end; nil, and why there is none.
---@package
function secret.read_file(path)
  local file, err = io.open(path, "rb")
  if not file then return nil, "it cannot be read: " .. err end
  local text, why = file:read(LARGEST + 1)
  file:close()
  if text and #text > LARGEST then return nil, ("the file %s is larger than %d bytes"):format(path, LARGEST) end
  if not text and why then return nil, ("the file %s cannot be read: %s"):format(path, why) end
  return text_or_why((text or ""):gsub("\r?\n$", ""), "the file " .. path)
end

--- What an environment variable holds.
---@param name string
---@return fun(): string|nil, string?
function secret.env(name)
  argument("secret.env: a variable's name", name)
  return make(function() return secret.read_env(name) end)
end

--- What a file holds, without the line's end at its end: `/run/secrets/…` of containers, systemd's credentials.
---@param path string
---@return fun(): string|nil, string?
function secret.file(path)
  argument("secret.file: a path", path)
  return make(function() return secret.read_file(path) end)
end

--- What a function answers: the value, or nil and why there is none. It may wait, as handlers do.
---@param fn fun(): string|nil, string?
---@return fun(): string|nil, string?
function secret.from(fn)
  if type(fn) ~= "function" then error("secret.from: a function expected, not a " .. type(fn), 2) end
  if ours[fn] then return fn end
  return make(function()
    local value, why = fn()
    if value == nil then return nil, why and tostring(why) or "the function gave none" end
    if type(value) ~= "string" then return nil, "the function gave a " .. type(value) .. ", and no string" end
    return text_or_why(value, "what the function gave")
  end)
end

--- Whether a value is a secret.
---@param value any
---@return boolean
function secret.is(value) return ours[value] ~= nil end

--- Asks for a secret: true; nil, and why there is none.
---@package
---@param fn function
---@return true|nil, string?
function secret.check(fn)
  local ok, value, why = protect(fn)
  if ok and value ~= nil then return true end
  return nil, tostring(ok and why or value)
end

return secret
