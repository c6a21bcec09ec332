--- JSON for the command line: sorted keys, exact integers, and no byte lost.
-- Bytes that are no UTF-8 have no place in JSON, so they are written as base64 and say so.
-- Reading is lua-cjson's work.

local ok_core, core = pcall(require, "moonrabbit.core")
local null = ok_core and core.null or nil

local json = {}

local math_type = rawget(math, "type")

--- Whether a string is well-formed UTF-8.
function json.is_utf8(s)
  local i = s:find("[\128-\255]")
  while i do
    local c = s:byte(i)
    local n
    local low, high = 0x80, 0xBF
    if c >= 0xC2 and c <= 0xDF then n = 1
    elseif c >= 0xE0 and c <= 0xEF then
      n = 2
      if c == 0xE0 then low = 0xA0 elseif c == 0xED then high = 0x9F end
    elseif c >= 0xF0 and c <= 0xF4 then
      n = 3
      if c == 0xF0 then low = 0x90 elseif c == 0xF4 then high = 0x8F end
    else
      return false
    end
    for k = 1, n do
      local d = s:byte(i + k)
      if not d or d < low or d > high then return false end
      low, high = 0x80, 0xBF
    end
    i = s:find("[\128-\255]", i + n + 1)
  end
  return true
end

local alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

function json.base64(s)
  local out = {}
  for i = 1, #s, 3 do
    local a, b, c = s:byte(i, i + 2)
    local n = a * 65536 + (b or 0) * 256 + (c or 0)
    for k = 0, 3 do
      local digit = math.floor(n / 64 ^ (3 - k)) % 64
      out[#out + 1] = alphabet:sub(digit + 1, digit + 1)
    end
    if not c then out[#out] = "=" end
    if not b then out[#out - 1] = "=" end
  end
  return table.concat(out)
end

local escapes = {
  ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t",
}
local function escape(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end

local function quote(s) return '"' .. s:gsub('[%c"\\]', escape) .. '"' end

local function number(n)
  if math_type and math_type(n) == "integer" then return tostring(n) end
  if n ~= n or n == math.huge or n == -math.huge then return "null" end
  if n == math.floor(n) and math.abs(n) < 2 ^ 53 then return ("%.0f"):format(n) end
  local short = ("%.15g"):format(n)
  return tonumber(short) == n and short or ("%.17g"):format(n)
end

local encode

--- The metatable of a list that is one even when it is empty.
json.list = {}

local function is_array(t)
  if getmetatable(t) == json.list then return true end
  local count = 0
  for _ in pairs(t) do count = count + 1 end
  return count > 0 and count == #t
end

local function object(t)
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = tostring(key) end
  table.sort(keys)
  local out = {}
  for i, key in ipairs(keys) do
    local value = t[key]
    if value == nil then value = t[tonumber(key)] end
    out[i] = quote(key) .. ":" .. encode(value)
  end
  return "{" .. table.concat(out, ",") .. "}"
end

-- A value with an exact wire type: its number where JSON can hold it, else its text.
local function typed(value)
  local ok, kind, inner = pcall(function() return value.type, value.value end)
  if not ok or not kind then return quote(tostring(value)) end
  -- Its text is exact where Lua's numbers are not.
  local exact = tostring(value):match "^%-?%d+$"
  if exact then return exact end
  if type(inner) == "number" then return number(inner) end
  if type(inner) == "string" and kind == "bytes" then return '{"base64":' .. quote(json.base64(inner)) .. "}" end
  return quote(tostring(inner == nil and value or inner))
end

--- Any Lua value as one line of JSON.
function encode(value)
  if value == nil or (null ~= nil and value == null) then return "null" end
  local kind = type(value)
  if kind == "string" then
    if json.is_utf8(value) then return quote(value) end
    return '{"base64":' .. quote(json.base64(value)) .. "}"
  elseif kind == "number" then return number(value)
  elseif kind == "boolean" then return tostring(value)
  elseif kind == "table" then
    if is_array(value) then
      local out = {}
      for i, item in ipairs(value) do out[i] = encode(item) end
      return "[" .. table.concat(out, ",") .. "]"
    end
    return object(value)
  end
  return typed(value)
end
json.encode = encode

-- cjson gives every number as a float; AMQP tells integers from floats.
local function tidy(value, cjson_null)
  if value == cjson_null then return null end
  if type(value) == "number" and value == math.floor(value) and math.abs(value) < 2 ^ 53 then
    return tonumber(("%.0f"):format(value))
  elseif type(value) == "table" then
    for key, item in pairs(value) do value[key] = tidy(item, cjson_null) end
  end
  return value
end

--- The value of a JSON text, or nil and what is wrong with it.
function json.decode(text)
  local ok, cjson = pcall(require, "cjson")
  if not ok then return nil, "reading JSON needs lua-cjson (Debian: lua-cjson; else: luarocks install lua-cjson)" end
  local parsed, value = pcall(cjson.decode, text)
  if not parsed then
    return nil, (tostring(value):gsub("^.-:%d+: ", ""))
  end
  return tidy(value, cjson.null)
end

return json
