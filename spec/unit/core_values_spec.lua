local core = require "moonrabbit.core"

local types, null = core.types, core.null
local has_integers = math.type ~= nil -- luacheck: ignore

local function round_trip(t, is_arguments) return core.decode_table(core.encode_table(t, is_arguments)) end

--- The wire type of { x = value }.
local function kind(value, is_arguments) return core.encode_table({ x = value }, is_arguments):sub(7, 7) end

local function fails(text, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(text, 1, true), "'" .. tostring(err) .. "' does not contain '" .. text .. "'")
end

describe("core.encode_table and decode_table #smoke", function()
  it("bring scalars back", function()
    local t = { s = "text", e = "", z = "a\0b", t = true, f = false, i = 7, n = -1, big = 5000000000, d = 1.5 }
    assert.same(t, round_trip(t))
  end)

  it("choose wire types", function()
    assert.equal("S", kind "x")
    assert.equal("t", kind(true))
    assert.equal("I", kind(2147483647))
    assert.equal("I", kind(-2147483648))
    assert.equal("l", kind(2147483648))
    assert.equal("l", kind(-2147483649))
    assert.equal("d", kind(1.5))
    assert.equal("V", kind(null))
    assert.equal("A", kind { 1 })
    assert.equal("F", kind { a = 1 })
    assert.equal("F", kind {})
  end)

  it("send integral floats as integers in arguments only", function()
    assert.equal("I", kind(60 * 1000 / 2, true))
    assert.equal("l", kind(2 ^ 40, true))
    assert.equal("d", kind(2 ^ 60, true))
    assert.equal(has_integers and "d" or "I", kind(60 * 1000 / 2))
  end)

  it("nest", function()
    local t = { a = { 1, "two", { 3, { deep = { true } } } }, m = { x = { y = { z = "end" } } } }
    assert.same(t, round_trip(t))
  end)

  it("keep null", function()
    local t = round_trip { a = null, list = { 1, null, 3 } }
    assert.equal(null, t.a)
    assert.equal(null, t.list[2])
    assert.equal(3, #t.list)
    assert.equal("null", tostring(null))
  end)

  it("refuse what cannot be sent, and say where", function()
    fails("table.a: a function cannot be sent", core.encode_table, { a = print })
    fails("table.a.b[2].c: a thread cannot be sent", core.encode_table,
      { a = { b = { 1, { c = coroutine.create(function() end) } } } })
    fails("table.x.y: a table must have string keys or be an array, not both", core.encode_table,
      { x = { y = { 1, a = 2 } } })
    fails("table: its keys must be strings", core.encode_table, { 1, 2 })
    fails("table: a key cannot be a boolean", core.encode_table, { [true] = 1 })
    fails("table.a: an array must be a sequence", core.encode_table, { a = { [5] = 1 } })
    fails("table.a: an array must be a sequence", core.encode_table, { a = { [1.5] = 1 } })
    fails("table.a: a userdata of another library cannot be sent", core.encode_table, { a = io.stdout })
    fails("longer than 255", core.encode_table, { [("k"):rep(256)] = 1 })
    fails("table expected", core.encode_table, "x")
    assert.same({ [("k"):rep(255)] = 1 }, round_trip { [("k"):rep(255)] = 1 })
  end)

  it("refuse NaN and infinity but from types", function()
    fails("table.x: not a finite number", core.encode_table, { x = 0 / 0 })
    fails("table.x: not a finite number", core.encode_table, { x = 1 / 0 })
    local t = round_trip { nan = types.double(0 / 0), inf = types.float(-1 / 0) }
    assert.is_true(t.nan ~= t.nan)
    assert.equal(-1 / 0, t.inf)
  end)

  it("refuse cycles and deep nesting", function()
    local cycle = {}
    cycle.again = cycle
    fails("nested too deep", core.encode_table, cycle)
    local function deep(n, map)
      local t = {}
      for _ = 2, n do t = map and { a = t } or { { t } } end
      return map and t or { a = t }
    end
    assert.same(deep(32, true), round_trip(deep(32, true)))
    fails("nested too deep", core.encode_table, deep(33, true))
    fails("nested too deep", core.encode_table, deep(20, false))
  end)

  it("decode only well-formed tables", function()
    local good = core.encode_table { a = "b", c = { 1, 2 } }
    for n = 0, #good - 1 do
      assert.is_false(pcall(core.decode_table, good:sub(1, n)))
    end
    assert.is_false(pcall(core.decode_table, good .. "x"))
    assert.is_false(pcall(core.decode_table, "\0\0\0\3\1x?"))
    assert.same({}, core.decode_table "\0\0\0\0")
  end)

  it("take a large table", function()
    local t = {}
    for i = 1, 2000 do t["key" .. i] = ("v"):rep(i) end
    assert.same(t, round_trip(t))
  end)
end)

describe("core.types #smoke", function()
  local wire = { timestamp = "T", int8 = "b", uint8 = "B", int16 = "s", uint16 = "u", int32 = "I", uint32 = "i",
    int64 = "l", uint64 = "l", float = "f", double = "d", decimal = "D" }

  it("have their wire types", function()
    for name, letter in pairs(wire) do
      assert.equal(letter, kind(types[name](1)))
      assert.equal(name, types[name](1).type)
    end
    assert.equal("x", kind(types.bytes "ab"))
    assert.equal("t", kind(types.boolean(true)))
  end)

  it("have ranges", function()
    local ranges = { int8 = { -128, 127 }, uint8 = { 0, 255 }, int16 = { -32768, 32767 }, uint16 = { 0, 65535 },
      int32 = { -2147483648, 2147483647 }, uint32 = { 0, 4294967295 }, decimal = { 0, 4294967295 } }
    for name, range in pairs(ranges) do
      local low, high = types[name](range[1]), types[name](range[2])
      if name ~= "decimal" then
        assert.same({ a = range[1], b = range[2] }, round_trip { a = low, b = high })
      end
      fails("types." .. name, types[name], range[1] - 1)
      fails("types." .. name, types[name], range[2] + 1)
    end
    fails("types.timestamp", types.timestamp, -1)
    fails("types.uint64", types.uint64, -1)
    fails("types.int32", types.int32, 1.5)
    fails("types.int32", types.int32, 0 / 0)
    fails("types.int32", types.int32, {})
    fails("types.int64", types.int64, "12x")
    fails("types.int64", types.int64, "9223372036854775808")
    fails("types.float", types.float, 1e39)
  end)

  it("are exact beyond 2^53", function()
    local all = { "9007199254740993", "-9007199254740993", "9223372036854775807", "-9223372036854775808" }
    for _, digits in ipairs(all) do
      local value = types.int64(digits)
      assert.equal(digits, tostring(value))
      local back = round_trip({ x = value }).x
      if has_integers then
        assert.equal("integer", math.type(back)) -- luacheck: ignore
      else
        assert.equal("int64", back.type)
        assert.is_true(back == value)
      end
      assert.equal(digits, has_integers and ("%d"):format(back) or tostring(back))
    end
    assert.equal("number", type(round_trip({ x = 2 ^ 53 }).x))
  end)

  it("compare by value", function()
    assert.is_true(types.int64(5) == types.int64(5))
    assert.is_false(types.int64(5) == types.int64(6))
    assert.is_false(types.int64(5) == types.int32(5))
    assert.is_true(types.bytes "x" == types.bytes "x")
    assert.is_false(types.bytes "x" == types.bytes "xy")
    assert.is_true(types.decimal(1234, 2) == types.decimal(1234, 2))
    assert.is_false(types.decimal(1234, 2) == types.decimal(1234, 3))
  end)

  it("show their value", function()
    assert.equal(5, types.int64(5).value)
    assert.equal("5", tostring(types.int64(5)))
    assert.equal("ab", types.bytes("ab").value)
    assert.equal("12.34", tostring(types.decimal(1234, 2)))
    assert.equal("0.05", tostring(types.decimal(5, 2)))
    assert.equal(12.34, types.decimal(1234, 2).value)
    assert.equal(2, types.decimal(1234, 2).scale)
    assert.equal(1234, types.decimal(1234, 2).unscaled)
    assert.equal(1.5, types.double(1.5).value)
    assert.is_nil(types.int8(1).other)
    fails("cannot be changed", function() types.int8(1).value = 2 end)
  end)

  it("come back as Lua values, but for decimals", function()
    local t = round_trip { at = types.timestamp(1700000000), b = types.bytes "\0\1", d = types.decimal(314, 2) }
    assert.equal(1700000000, t.at)
    assert.equal("\0\1", t.b)
    assert.equal("decimal", t.d.type)
    assert.equal(3.14, t.d.value)
    assert.is_true(t.d == types.decimal(314, 2))
  end)

  it("show unsigned integers that no signed one holds", function()
    local t = core.decode_table("\0\0\0\11\1xL" .. ("\255"):rep(8))
    assert.equal("18446744073709551615", tostring(t.x))
    fails("table.x: out of range", core.encode_table, t)
  end)
end)

describe("core, of a message", function()
  local fake = require "support.fake_broker"

  local function delivered(opts)
    local b = fake.new():open()
    local channel = b:channel()
    local queue = b:consumer(channel, "tag")
    b:send(fake.deliver(1, "tag", 1, "body", opts))
    while b.engine:pump() do end
    return queue:pop()
  end

  it("tells its message id, and its key unless it has a header, without their tables", function()
    local table_of = core.encode_table { a = 1, ["moonrabbit-x"] = "y" }
    -- content_type, headers, message_id
    local full = delivered { properties = fake.u16(0x8000 + 0x2000 + 0x0080) .. fake.short "text/plain" .. table_of
      .. fake.short "id-7" }
    assert.equal("id-7", full.message_id)
    assert.is_nil(core.key_without(full, "moonrabbit-x"))
    assert.equal(full.routing_key, core.key_without(full, "moonrabbit"))
    local bare = delivered()
    assert.is_nil(bare.message_id)
    assert.equal(bare.routing_key, core.key_without(bare, "a"))
    assert.is_nil(core.key_without({ routing_key = "k" }, "a"))
    assert.has_error(function() core.key_without(bare) end)
  end)

  it("tells whether it is to be settled", function()
    local message = delivered()
    assert.is_true(core.outstanding(message))
    core.ack(message)
    local ok, why = core.outstanding(message)
    assert.is_nil(ok)
    assert.equal("settled", why)
  end)
end)
