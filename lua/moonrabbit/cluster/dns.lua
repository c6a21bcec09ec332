--- DNS messages: questions for SRV records, and the answers to them (RFC 1035, RFC 2782). No sockets.
--
-- An answer is not trusted: lengths are checked, and a compressed name may only point backwards.
-- @module moonrabbit.cluster.dns

local dns = {}

local byte, char, floor = string.byte, string.char, math.floor

local SRV, IN = 33, 1
local RECURSION_DESIRED = 0x0100
local MAX_RECORDS = 512

local function u16(n) return char(floor(n / 256) % 256, n % 256) end

--- Whether a text can be a name of DNS.
---@param name string
---@return boolean
function dns.is_name(name)
  name = name:gsub("%.$", "")
  if name == "" or #name > 253 then return false end
  for label in (name .. "."):gmatch "([^.]*)%." do
    if label == "" or #label > 63 then return false end
  end
  return true
end

--- The question for the SRV records of a name, as it goes on the wire.
---@param id integer     0 to 65535
---@param name string
---@return string
function dns.question(id, name)
  local labels = {}
  for label in name:gmatch "[^.]+" do labels[#labels + 1] = char(#label) .. label end
  return u16(id) .. u16(RECURSION_DESIRED) .. u16(1) .. ("\0"):rep(6) .. table.concat(labels) .. "\0" .. u16(SRV)
    .. u16(IN)
end

-- ---- Answers ----------------------------------------------------------------------------------------

local function read16(bytes, at)
  local a, b = byte(bytes, at, at + 1)
  if not b then return nil end
  return a * 256 + b
end

-- The name at `at`, and where what follows it begins; nil when it is broken.
local function read_name(bytes, at)
  local labels, size, after, limit = {}, 0, nil, at
  while true do
    local length = byte(bytes, at)
    if not length then return nil end
    if length == 0 then return table.concat(labels, "."), after or at + 1 end
    if length >= 192 then
      local pointer = read16(bytes, at)
      if not pointer then return nil end
      pointer = pointer - 0xc000 + 1
      if pointer >= limit then return nil end -- only backwards: it ends
      after, limit, at = after or at + 2, pointer, pointer
    elseif length > 63 then
      return nil
    else
      size = size + length + 1
      local label = bytes:sub(at + 1, at + length)
      if #label < length or size > 254 then return nil end
      labels[#labels + 1] = label
      at = at + length + 1
    end
  end
end

local function read_srv(bytes, at, length)
  local priority, weight, port = read16(bytes, at), read16(bytes, at + 2), read16(bytes, at + 4)
  if length < 7 or not port then return nil end
  local target, after = read_name(bytes, at + 6)
  if not target or after ~= at + length then return nil end
  return { priority = priority, weight = weight, port = port, target = target }
end

local function read_answers(bytes, at, count)
  local records = {}
  for _ = 1, count do
    local _, after = read_name(bytes, at)
    if not after then return nil end
    local kind, length = read16(bytes, after), read16(bytes, after + 8)
    if not length or after + 9 + length > #bytes then return nil end
    at = after + 10
    if kind == SRV and #records < MAX_RECORDS then
      local record = read_srv(bytes, at, length)
      if not record then return nil end
      records[#records + 1] = record
    end
    at = at + length
  end
  return records
end

local codes = { [1] = "FORMERR", [2] = "SERVFAIL", [3] = "NXDOMAIN", [4] = "NOTIMP", [5] = "REFUSED" }

--- The SRV records of an answer, without those of a service that is not there (the target "."); or nil and
--- "NXDOMAIN", "SERVFAIL", … or "nonsense". A name without SRV records: an empty list.
---@param bytes string
---@param id integer   of the question
---@return { priority: integer, weight: integer, port: integer, target: string }[]|nil records, string? code
function dns.answer(bytes, id)
  local flags, questions, answers = read16(bytes, 3), read16(bytes, 5), read16(bytes, 7)
  if #bytes < 12 or read16(bytes, 1) ~= id or flags < 0x8000 or questions ~= 1 then return nil, "nonsense" end
  local code = flags % 16
  if code ~= 0 then return nil, codes[code] or "code " .. code end
  local _, after = read_name(bytes, 13)
  if not after then return nil, "nonsense" end
  local records = read_answers(bytes, after + 4, answers)
  if not records then return nil, "nonsense" end
  local usable = {}
  for _, record in ipairs(records) do
    if record.target ~= "" and record.port > 0 then usable[#usable + 1] = record end
  end
  return usable
end

-- ---- Order ------------------------------------------------------------------------------------------

-- Draws one of a list by weight: RFC 2782. Those of weight 0 come first in the running sum.
local function draw_one(list, random)
  local sum = 0
  for _, record in ipairs(list) do sum = sum + record.weight end
  local mark, running = floor(random() * (sum + 1)), 0
  for i, record in ipairs(list) do
    running = running + record.weight
    if running >= mark then return table.remove(list, i) end
  end
  return table.remove(list)
end

--- Puts records into the order in which they are to be tried: by priority, and among equals by chance and weight.
---@param records table[]
---@param random fun(): number
---@return table[]
function dns.order(records, random)
  local by_priority, priorities = {}, {}
  for _, record in ipairs(records) do
    local group = by_priority[record.priority]
    if not group then
      group = {}
      by_priority[record.priority] = group
      priorities[#priorities + 1] = record.priority
    end
    table.insert(group, record.weight == 0 and 1 or #group + 1, record)
  end
  table.sort(priorities)
  local ordered = {}
  for _, priority in ipairs(priorities) do
    local group = by_priority[priority]
    while #group > 0 do ordered[#ordered + 1] = draw_one(group, random) end
  end
  return ordered
end

return dns
