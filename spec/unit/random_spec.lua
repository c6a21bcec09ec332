-- Numbers by chance. That a process which was forked begins anew is seen in nginx: spec/resty/random_spec.lua.
local random = require "moonrabbit.random"
local process = require "support.process"

describe("random numbers", function()
  it("are spread over 0 to 1, and differ", function()
    local seen, tenths = {}, {}
    for _ = 1, 1000 do
      local x = random.number()
      assert.is_true(x >= 0 and x < 1)
      assert.is_nil(seen[x])
      seen[x] = true
      local tenth = math.floor(x * 10)
      tenths[tenth] = (tenths[tenth] or 0) + 1
    end
    for tenth = 0, 9 do assert.is_true(tenths[tenth] > 40, tenth) end -- 100 are to be expected; 40: 6 deviations
  end)

  it("may be whole", function()
    local high = 0
    for _ = 1, 50 do
      local n = random.integer()
      assert.is_true(n == math.floor(n) and n >= 0 and n < 2 ^ 48)
      high = math.max(high, n)
    end
    assert.is_true(high > 2 ^ 44)
  end)

  it("may be bytes and digits", function()
    assert.equal(256, #random.bytes(256))
    assert.are_not.equal(random.bytes(16), random.bytes(16))
    assert.matches("^" .. ("%x"):rep(24) .. "$", random.hex(12))
    for _, n in ipairs { 0, 257, -1 } do assert.is_false(pcall(random.bytes, n)) end
  end)

  it("shuffle a list into any order", function()
    local seen, count = {}, 0
    for _ = 1, 200 do seen[table.concat(random.shuffle { "a", "b", "c" })] = true end
    for _ in pairs(seen) do count = count + 1 end
    assert.equal(6, count)
    assert.same({ "b", "a" }, random.shuffle({ "a", "b" }, function() return 0 end))
  end)

  it("are others in another process, and in another state", function()
    local script = process.file [[
      local random = require "moonrabbit.random"
      print(random.number(), random.number(), random.number())
    ]]
    local one, other = process.run { script }.out, process.run { script }.out
    os.remove(script)
    assert.matches("^0%.%d+%s+0%.%d+", one)
    assert.are_not.equal(one, other)
  end)
end)
