--- JSON of the management API, by lua-cjson.
-- @module moonrabbit.management.json

local json = {}

local codec

-- A codec of our own: settings of cjson are shared by all who use it.
local function library()
  if codec then return codec end
  local ok, cjson = pcall(require, "cjson")
  if not ok then
    error("the management API needs lua-cjson (Debian: lua-cjson; else: luarocks install lua-cjson): "
      .. tostring(cjson):match "^[^\n]*", 0)
  end
  codec = cjson.new()
  codec.decode_max_depth(100)
  return codec
end

-- cjson reads every number as a float, which Lua 5.3 and later print with a ".0".
local function integral(n)
  if n == math.floor(n) and n > -2 ^ 53 and n < 2 ^ 53 then return tonumber(("%.0f"):format(n)) end
  return n
end

-- Integers become integers, and null what is not there (false in a list, which keeps its length).
local function tidy(value, null)
  for key, item in pairs(value) do
    if item == null then
      value[key] = type(key) == "number" and false or nil
    elseif type(item) == "number" then
      value[key] = integral(item)
    elseif type(item) == "table" then
      tidy(item, null)
    end
  end
  return value
end

--- The object or list of a JSON text; nil when it is none.
---@param text string
---@return table|nil
function json.decode(text)
  local cjson = library()
  local ok, value = pcall(cjson.decode, text)
  if not ok or type(value) ~= "table" then return nil end
  return tidy(value, cjson.null)
end

--- A Lua value as JSON; nil, and what cannot be encoded. An empty table is an object.
---@param value any
---@return string|nil text, string? problem
function json.encode(value)
  local ok, text = pcall(library().encode, value)
  if ok then return text end
  return nil, (tostring(text):gsub("^.-:%d+: ", ""))
end

return json
